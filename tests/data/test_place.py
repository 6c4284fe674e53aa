"""A place in the data is a number of samples: it holds for any batch size and hosts, and for the same data alone."""

import itertools
import json
import shutil

import grain
import numpy as np
import pytest
import raw_sets
import tiny

from dreamlite_jax.config import to_dict
from dreamlite_jax.data import latents, place
from dreamlite_jax.data.config import BucketConfig, DataConfig, SourceConfig
from dreamlite_jax.data.forms import Images
from dreamlite_jax.data.mixture import raw_batches
from dreamlite_jax.errors import UserError

SIZES = ((16, 16), (48, 16), (16, 48))
ONE, SEVERAL = BucketConfig(size=16, multiple=16), BucketConfig(size=32, multiple=16, max_ratio=3.0)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """64 and 36 raw pictures of three shapes; latents of 64 and 36 examples of one."""
    folder = tmp_path_factory.mktemp("place")
    raw_sets.write_folder(folder / "raw", 64, SIZES)
    raw_sets.write_folder(folder / "more", 36, SIZES, first=1000)
    tiny.write_latents(folder / "latents", "generate", 64)
    tiny.write_latents(folder / "edits", "edit", 36)
    return folder


def latent_batches(root, names=("latents", "edits"), batch_size=4, host=0, hosts=1, weights=(1.0, 1.0), **options):
    sources = [SourceConfig(str(root / name), weight) for name, weight in zip(names, weights, strict=False)]
    options = {"text_length": 8, "seed": 0, "threads": 1} | options
    return iter(latents.mixture(sources, batch_size=batch_size, host=host, hosts=hosts, **options))


def raw(root, names=("raw", "more"), batch_size=4, host=0, hosts=1, buckets=SEVERAL, weights=(1.0, 1.0), **options):
    pairs = zip(names, weights, strict=False)
    sources = tuple(SourceConfig(str(root / name), weight, kind="folder") for name, weight in pairs)
    seed = options.pop("seed", 0)
    data = DataConfig(sources, batch_size, buckets=buckets, **options)
    return iter(raw_batches(data, Images, seed=seed, host=host, hosts=hosts))


def raw_square(root, **options):
    return raw(root, buckets=ONE, **options)


def names(batch):
    """What tells the samples of a batch apart."""
    if "image" in batch:
        return [raw_sets.number(picture) for picture in batch["image"]]
    return batch["target"][:, 0, 0, 0].tolist()


def samples(iterator, batches):
    return [name for batch in itertools.islice(iterator, batches) for name in names(batch)]


def saved(iterator):
    return json.loads(json.dumps(iterator.get_state()))  # as a checkpoint keeps it


@pytest.mark.parametrize("start", [latent_batches, raw_square], ids=["latents", "pictures"])
@pytest.mark.parametrize(("before", "after"), [(4, 8), (8, 4), (4, 6), (6, 1)])
def test_another_batch_size_goes_on_at_the_same_sample(root, start, before, after):
    """13 batches before: 52 or 104 or 78 samples, within an epoch of one source and after that of another."""
    whole = samples(start(root, batch_size=1), 250)
    iterator = start(root, batch_size=before)
    assert samples(iterator, 13) == whole[: 13 * before]
    resumed = start(root, batch_size=after)
    resumed.set_state(saved(iterator))
    assert samples(resumed, 120 // after) == whole[13 * before :][: 120 // after * after]
    again = start(root, batch_size=before)
    again.set_state(saved(resumed))
    assert samples(again, 2) == whole[13 * before + 120 // after * after :][: 2 * before]


@pytest.mark.parametrize("start", [latent_batches, raw_square], ids=["latents", "pictures"])
def test_the_rest_of_an_epoch_comes_once_after_a_change_of_batch_and_hosts(root, start):
    """64 records of one source; 13 batches of 4, then batches of 6 on 1, 2 and 3 hosts."""
    one = {latent_batches: ("latents",), raw_square: ("raw",)}[start]
    iterator = start(root, names=one)
    seen = samples(iterator, 13)
    for hosts in (1, 2, 3):
        iterators = [start(root, names=one, batch_size=6, host=host, hosts=hosts) for host in range(hosts)]
        for resumed in iterators:
            resumed.set_state(saved(iterator))
        rest = [name for _ in range(2) for resumed in iterators for name in names(next(resumed))]
        assert len({*seen, *rest}) == 64 == len(seen) + len(rest)
        assert all(saved(resumed) == saved(iterators[0]) for resumed in iterators)


@pytest.mark.parametrize(("before", "after"), [(4, 6), (8, 3), (5, 5)])
def test_buckets_lose_and_repeat_nothing_when_the_batch_changes(root, before, after):
    """What was given out and what lies on piles are the beginning of the stream, each of its samples once."""
    iterator = raw(root, names=("raw",), batch_size=before)
    found = samples(iterator, 9)
    resumed = raw(root, names=("raw",), batch_size=after)
    resumed.set_state(saved(iterator))
    found += samples(resumed, 60)
    state, stream = saved(resumed), resumed._batches.plan().stream
    waiting = stream.samples(np.asarray(state["waiting"], np.int64))[:, 1].tolist()
    assert len(found) == 9 * before + 60 * after and len(waiting) < 3 * max(before, after)
    assert sorted(found + waiting) == sorted(stream.samples(np.arange(state["next"]))[:, 1].tolist())


def test_places_of_before_counted_batches(root):
    """As grain's own iterator counted them; its batches are the same as ours."""
    sources = [SourceConfig(str(root / name)) for name in ("latents", "edits")]
    config = to_dict(DataConfig(tuple(sources), 4))
    reader = latents.LatentReader(sources, 8)
    streams = [
        grain.MapDataset.range(length).seed(i).shuffle().repeat().map(lambda n, i=i: reader.load(i, int(n), 0))
        for i, length in enumerate(reader.lengths)
    ]
    old = iter(grain.MapDataset.mix(streams, [1.0, 1.0]).batch(4, drop_remainder=True).to_iter_dataset())
    assert samples(old, 13) == samples(latent_batches(root), 13)
    position = place.upgraded(saved(old), {"seed": 0, "data": config})
    resumed = latent_batches(root, batch_size=8)
    resumed.set_state(position)
    assert samples(resumed, 10) == samples(old, 20)
    assert place.upgraded(saved(resumed), {}) == saved(resumed)  # one of today stays as it is


def test_places_of_before_in_buckets(root):
    iterator = raw(root)
    samples(iterator, 7)
    state = {name: value for name, value in saved(iterator).items() if name != "data"}
    config = {"seed": 0, "data": to_dict(DataConfig(tuple(iterator._batches.reader.configs), 4))}
    resumed = raw(root)
    resumed.set_state(place.upgraded(state, config))
    assert samples(resumed, 9) == samples(iterator, 9)
    fewer = raw(root, names=("raw", "raw"))
    with pytest.raises(UserError, match=r"sources\[1\].path is '.*raw', was '.*more'.*has 64 records, had 36"):
        fewer.set_state(place.upgraded(state, config))


STARTS = {"latents": latent_batches, "square": raw_square, "buckets": raw}


@pytest.mark.parametrize("kind", STARTS)
def test_one_rule_for_other_data_whatever_their_shapes(root, tmp_path, kind, capsys):
    start, folder = STARTS[kind], {"latents": "latents"}.get(kind, "raw")
    second = {"latents": "edits"}.get(kind, "more")
    iterator = start(root, names=(folder, second))
    samples(iterator, 3)
    position = saved(iterator)
    shutil.copytree(root / folder, tmp_path / "moved", dirs_exist_ok=True)
    shutil.copytree(root / second, tmp_path / second)
    moved = start(tmp_path, names=("moved", second))
    moved.set_state(position)  # the same content, elsewhere
    assert samples(moved, 3) == samples(iterator, 3)
    if kind == "latents":
        tiny.write_latents(tmp_path / "other", "generate", 64, seed=5)
    else:
        raw_sets.write_folder(tmp_path / "other", 64, SIZES, first=500)
    shutil.rmtree(tmp_path / "moved")
    shutil.copytree(tmp_path / "other", tmp_path / folder)  # other records under the same name
    cases = (
        (start(root, names=(folder,)), r"config.data.sources has 1 entries, had 2 \(.*\)"),
        (start(root, names=(folder, second), weights=(2.0, 1.0)), r"config.data.sources\[0\].weight is 2, was 1"),
        (start(root, names=(folder, second), seed=1), r"config.seed is 1, was 0"),
        (
            start(root, names=(folder, folder)),
            rf"sources\[1\].path is '.*{folder}', was '.*{second}'; .* 64 records, had 36",
        ),
        (start(tmp_path, names=("other", second)), r"sources\[0\].path is '.*other', was"),
        (start(tmp_path, names=(folder, second)), r"sources\[0\].path is '.*', was"),
    )
    for changed, says in cases:
        with pytest.raises(UserError, match=says):
            changed.set_state(position)
    in_place = {**position, "data": json.loads(json.dumps(position["data"]).replace(str(root), str(tmp_path)))}
    with pytest.raises(UserError, match=r"sources\[0\] \(.*\) has as many records as before, but other ones"):
        start(tmp_path, names=(folder, second)).set_state(in_place)

    anew = start(root, names=(folder,), on_change="restart")
    capsys.readouterr()
    anew.set_state(position)
    assert "from the beginning of other data: config.data.sources has 1 entries, had 2" in capsys.readouterr().err
    assert samples(anew, 3) == samples(start(root, names=(folder,)), 3)
    resumed = start(root, names=(folder,), on_change="restart")
    resumed.set_state(saved(anew))  # now these are its data: no second beginning
    assert samples(resumed, 3) == samples(anew, 3) and "beginning of other data" not in capsys.readouterr().err


def test_a_record_that_is_damaged_or_mended_makes_no_other_data(root, tmp_path):
    """Whether or not it is one of those that were looked at; a word in the list of pictures does."""
    shutil.copytree(root / "raw", tmp_path / "raw")
    options = {"names": ("raw",), "max_bad_fraction": 0.5}
    iterator = raw(tmp_path, **options)
    samples(iterator, 3)
    for name in ("00000.png", "00001.png", "00063.png"):
        picture = (tmp_path / "raw" / name).read_bytes()
        (tmp_path / "raw" / name).unlink()
        damaged = raw(tmp_path, **options)
        damaged.set_state(saved(iterator))
        (tmp_path / "raw" / name).write_bytes(picture)
        mended = raw(tmp_path, **options)
        mended.set_state(saved(damaged))
    lines = (tmp_path / "raw" / "metadata.jsonl").read_text().replace("number 40", "number xx")
    (tmp_path / "raw" / "metadata.jsonl").write_text(lines)
    with pytest.raises(UserError, match="has as many records as before, but other ones"):
        raw(tmp_path, **options).set_state(saved(iterator))
