"""Precomputed latents: records, the edit loss's weights, and a mixture that is exact, deterministic and resumable."""

import dataclasses
import itertools
import json

import grain
import msgpack
import numpy as np
import pytest
import tiny

from dreamlite_jax.data import latents
from dreamlite_jax.data.config import SourceConfig
from dreamlite_jax.errors import UserError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Sources of 16 texts and 12 edits."""
    root = tmp_path_factory.mktemp("latents")
    tiny.write_latents(root / "t2i", "generate", 16)
    tiny.write_latents(root / "edit", "edit", 12)
    return root


def stream(root, weights=(1.0, 1.0), **options):
    weighted = zip(("t2i", "edit"), weights, strict=True)
    sources = [SourceConfig(str(root / name), weight) for name, weight in weighted if weight]
    return iter(latents.mixture(sources, **({"batch_size": 8, "text_length": 8, "seed": 0, "threads": 1} | options)))


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def names(batch):
    """What tells items apart: the first number of the target."""
    return batch["target"][:, 0, 0, 0].tolist()


def same(a, b):
    return all(np.array_equal(a[key], b[key]) for key in a) and a.keys() == b.keys()


@pytest.mark.parametrize("task", ["generate", "edit"])
def test_records_keep_everything(task):
    for example in tiny.examples(task, 3):
        again = latents.unpack(latents.pack(example))
        for field in dataclasses.fields(example):
            a, b = getattr(example, field.name), getattr(again, field.name)
            assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b, field.name
        assert again.target.dtype == again.states.dtype == np.float32


def test_records_of_before_null_prompts_had_pictures_are_read():
    fields = msgpack.unpackb(latents.pack(tiny.examples("edit", 1)[0]))
    old = msgpack.packb({name: value for name, value in fields.items() if not name.startswith("null_")})
    example = latents.unpack(old)
    assert example.null_tail is None and example.null_from == -1
    assert "null_tail" not in latents.collate(example, 8)


def test_arrays_are_stored_in_half_precision():
    (example,) = tiny.examples("generate", 1)
    example = dataclasses.replace(example, target=np.full((4, 4, 4), 1 / 3, np.float32))
    np.testing.assert_allclose(latents.unpack(latents.pack(example)).target, 1 / 3, rtol=5e-4)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (np.full((2, 2), 1.0), np.ones((2, 2))),  # all of it: log2(1) + 1
        ([[1.0, 1.0], [0.0, 0.0]], [[2.0, 2.0], [1.0, 1.0]]),  # half: log2(2) + 1
        ([[0.0, 1.0], [0.0, 0.0]], [[1.0, 3.0], [1.0, 1.0]]),  # a quarter: log2(4) + 1
        ([[0.0, 0.25], [0.25, 0.0]], [[1.0, 4.0], [4.0, 1.0]]),  # an eighth of the area, on two latent pixels
        (np.zeros((2, 2)), np.ones((2, 2))),  # nothing the eye can see
    ],
)
def test_the_weight_of_the_changed_region_grows_as_it_shrinks(changed, expected):
    (example,) = tiny.examples("edit", 1)
    example = dataclasses.replace(example, target=np.zeros((2, 2, 4)), changed=np.asarray(changed, np.float32))
    np.testing.assert_allclose(latents.collate(example, 8)["weight"][..., 0], expected, rtol=1e-6)


def test_items_of_both_tasks_have_one_form():
    (generate,), (edit,) = tiny.examples("generate", 1), tiny.examples("edit", 1)
    items = [latents.collate(example, 8) for example in (generate, edit)]
    shapes = [{key: np.shape(value) for key, value in item.items()} for item in items]
    assert shapes[0] == shapes[1]
    assert not items[0]["source"].any() and items[0]["editing"] == 0 and (items[0]["weight"] == 1).all()
    assert np.array_equal(items[1]["source"], edit.source) and items[1]["editing"] == 1
    assert items[1]["mask"].tolist() == [1, 1, 1, 0, 0, 0, 0, 0] and not items[1]["text"][3:].any()
    assert np.array_equal(items[1]["text"][:3], edit.states) and items[1]["size"].tolist() == [16, 16]


def test_the_ratio_of_a_mixture_is_exact(folders):
    batches = take(stream(folders, weights=(3.0, 1.0)), 6)
    assert [int(batch["editing"].sum()) for batch in batches] == [2] * 6


def test_every_epoch_shows_each_record_once_in_another_order(folders):
    batches = take(stream(folders, weights=(1.0, 0.0)), 4)
    first, second = names(batches[0]) + names(batches[1]), names(batches[2]) + names(batches[3])
    assert len(set(first)) == 16 and set(first) == set(second) and first != second


def test_the_order_comes_from_the_seed_alone(folders):
    once, again = (take(stream(folders, threads=threads), 4) for threads in (1, 3))
    assert all(same(a, b) for a, b in zip(once, again, strict=True))
    other = take(stream(folders, seed=1), 4)
    assert [names(b) for b in once] != [names(b) for b in other]


def test_the_order_of_one_shape_is_that_of_grain_alone(folders):
    """Runs go on from checkpoints whose position is grain's; bad records must not change it for good ones."""
    parts = [
        grain.MapDataset.source(latents.open_examples(folders / name)).seed(i).shuffle().repeat()
        for i, name in enumerate(("t2i", "edit"))
    ]
    plain = grain.MapDataset.mix(parts, [3.0, 1.0]).map(lambda record: latents.collate(latents.unpack(record), 8))
    found = take(stream(folders, weights=(3.0, 1.0)), 6)
    assert all(same(a, b) for a, b in zip(take(iter(plain.batch(8)), 6), found, strict=True))


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_read_what_one_would(folders, hosts):
    alone = take(stream(folders), 3)
    shares = [take(stream(folders, host=host, hosts=hosts), 3) for host in range(hosts)]
    for i, whole in enumerate(alone):
        together = [name for share in shares for name in names(share[i])]
        assert together == names(whole)
        assert all(len(share[i]["target"]) == 8 // hosts for share in shares)


def test_a_saved_position_goes_on_exactly(folders):
    iterator = stream(folders)
    take(iterator, 3)
    position = json.loads(json.dumps(iterator.get_state()))  # as a checkpoint keeps it
    expected = take(iterator, 4)
    again = stream(folders)
    again.set_state(position)
    assert all(same(a, b) for a, b in zip(expected, take(again, 4), strict=True))
    assert not same(expected[0], next(stream(folders)))


def test_too_long_a_text_is_named(folders):
    (example,) = tiny.examples("edit", 1)
    with pytest.raises(UserError, match=r"record edit_0 has 3 text tokens; data.text_length 2"):
        latents.collate(example, 2)
    with pytest.raises(UserError, match=r"text tokens; data.text_length 2"):  # through the reading threads too
        next(stream(folders, text_length=2))


def test_a_batch_that_hosts_cannot_share_is_refused(folders):
    with pytest.raises(UserError, match="batch_size 8 is not a multiple of the 3 hosts"):
        stream(folders, hosts=3)


def test_incomplete_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere holds no complete set .*dreamlite_jax.precompute"):
        latents.open_examples(tmp_path / "nowhere")
    folder = tiny.write_latents(tmp_path / "set", "edit", 4, shards=2)
    assert len(latents.open_examples(folder)) == 4
    latents.shard_path(folder, 1, 2).rename(tmp_path / "aside")
    with pytest.raises(UserError, match=r"lacks shard latents-00001-of-00002.array_record"):
        latents.open_examples(folder)
    (tmp_path / "aside").rename(latents.shard_path(folder, 1, 2))
    info = json.loads((folder / "info.json").read_text())
    (folder / "info.json").write_text(json.dumps(info | {"format": 99}))
    with pytest.raises(UserError, match="has format 99; this version reads 1"):
        latents.open_examples(folder)
    (folder / "info.json").unlink()
    with pytest.raises(UserError, match=r"no info.json"):
        latents.open_examples(folder)


def test_a_shard_appears_whole_or_not_at_all(tmp_path):
    def failing():
        yield from tiny.examples("edit", 2)
        raise OSError("disk full")

    path = latents.shard_path(tmp_path, 0, 1)
    with pytest.raises(OSError, match="disk full"):
        latents.write_shard(path, failing())
    assert not list(tmp_path.iterdir())
    (tmp_path / "latents-00000-of-00001.123.tmp").touch()  # of a process that was killed
    latents.write_shard(path, iter(tiny.examples("edit", 2)))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(("field", "value"), [("target", np.nan), ("source", np.inf), ("states", -np.inf)])
def test_numbers_that_are_none_in_an_older_folder_are_named_where_they_are_read(tmp_path, monkeypatch, field, value):
    """Which kept them without a word; some processes read ahead in threads."""
    items = tiny.examples("edit", 6)
    array = np.array(getattr(items[3], field))
    array.reshape(-1)[5] = value
    items[3] = dataclasses.replace(items[3], **{field: array})
    tiny.write_latents(tmp_path / "set", "edit", 6, shards=1)
    monkeypatch.setattr(latents, "check_range", lambda *args: None)
    latents.write_shard(latents.shard_path(tmp_path / "set", 0, 1), iter(items))
    monkeypatch.undo()
    source = SourceConfig(str(tmp_path / "set"))
    iterator = iter(latents.mixture([source], batch_size=2, text_length=8, seed=0, threads=1))
    with pytest.raises(UserError, match=rf"set record 3 \(edit_3\): .*{field}.* hold \d NaN and \d infinite"):
        take(iterator, 3)
    with pytest.raises(UserError, match="set record 3"):
        latents.first_examples(source, 6)


@pytest.mark.parametrize("value", [np.nan, np.inf, 65_520.0, -1e9])
def test_no_record_takes_what_half_precision_has_not(value):
    (example,) = tiny.examples("generate", 1)
    fine = dataclasses.replace(example, target=np.full((4, 4, 4), 65_504.0))
    assert (latents.unpack(latents.pack(fine)).target == 65_504).all()
    with pytest.raises(UserError, match="record generate_0: latents of the target hold"):
        latents.pack(dataclasses.replace(example, target=np.full((4, 4, 4), value)))


def test_the_digest_of_a_folder_is_that_of_what_it_holds(tmp_path):
    """Of older folders too, which do not say what they were made of."""
    one = latents.folder_digest(tiny.write_latents(tmp_path / "one", "edit", 4))
    assert one == latents.folder_digest(tiny.write_latents(tmp_path / "same", "edit", 4))
    assert one != latents.folder_digest(tiny.write_latents(tmp_path / "more", "edit", 5))
    assert one != latents.folder_digest(tiny.write_latents(tmp_path / "other", "generate", 4))
