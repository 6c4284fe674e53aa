"""Precompute: what is in the shards, restarts, several hosts, other settings, shapes and bad records."""

import json
import os
import shutil
import threading

import numpy as np
import pytest
import raw_sets
import tiny
from PIL import Image

from dreamlite_jax import model_folder, precompute
from dreamlite_jax.data import encoding, kept, latents
from dreamlite_jax.data.config import SourceConfig
from dreamlite_jax.data.sprites import builder, render
from dreamlite_jax.errors import UserError
from dreamlite_jax.models.vae import VAE
from dreamlite_jax.pictures import to_float
from dreamlite_jax.text import load
from dreamlite_jax.text.encoder import PromptRequest
from dreamlite_jax.training.config import PrecomputeConfig, load_config

COUNTS = {"train": 20, "validation": 8, "heldout": 8}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("precompute")
    for task in builder.TASKS:
        builder.prepare(folder / "data", task, 64, COUNTS)
    tiny.write_vae(folder / "vae.safetensors")
    return folder


@pytest.fixture(autouse=True)
def quick_encoder(monkeypatch):
    monkeypatch.setattr(load, "load_encoder", lambda *args, **options: tiny.WordEncoder())


def encode(root, output, *arguments, name="edit_64"):
    overrides = {"source.path": root / "data", "vae": root / "vae.safetensors", "batch_size": 5, "shard_size": 8}
    overrides = [f"--config.{key}={value}" for key, value in overrides.items()]
    argv = ["--config", f"configs/precompute.py:{name}", "--output", str(output), *overrides, *arguments]
    assert precompute.main(argv) == 0
    return output


@pytest.fixture(scope="module")
def edits(root):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "load_encoder", lambda *args, **options: tiny.WordEncoder())
        return encode(root, root / "edit")


def examples(folder):
    records = latents.open_examples(folder)
    return [latents.unpack(records[i]) for i in range(len(records))]


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.array_record"))}


def shard(folder, index):
    (path,) = folder.glob(f"latents-{index:05d}-*.array_record")
    return path


def whole(folder):
    """All that a folder holds, by name, but for the names of bad records."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "bad_records"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("task", ["t2i", "edit"])
def test_shards_hold_each_record_encoded(root, edits, task):
    folder = edits if task == "edit" else encode(root, root / "t2i", name="t2i_64")
    source = builder.open_split(root / "data", task, 64, "train")
    records, found = [builder.decode(source[i]) for i in range(len(source))], examples(folder)
    assert [e.id for e in found] == [r["id"] for r in records]
    config, params = model_folder.load_vae(root / "vae.safetensors")

    def encoded(pictures):
        return np.asarray(VAE(config).apply({"params": params}, to_float(np.stack(pictures)), method="encode"))

    targets = encoded([r["target"] for r in records])
    for example, record, target in zip(found, records, targets, strict=True):
        assert (example.task, example.text, example.size) == (record["task"], record["text"], (64, 64))
        np.testing.assert_allclose(example.target, target, rtol=2e-3, atol=1e-3)
        states = tiny.WordEncoder().encode([PromptRequest(record["task"], record["text"])])
        expected = states.states[0, : int(states.mask[0].sum())]
        np.testing.assert_allclose(example.states, expected, rtol=1e-3, atol=1e-3)
    if task == "t2i":
        assert all(e.source is None and e.changed is None for e in found)
        return
    sources = encoded([r["source"] for r in records])
    for example, record, given in zip(found, records, sources, strict=True):
        np.testing.assert_allclose(example.source, given, rtol=2e-3, atol=1e-3)
        region = render.changed_region(record["source_scene"], record["scene"], 64)
        share = region.reshape(16, 4, 16, 4).mean((1, 3))
        np.testing.assert_allclose(example.changed, share, atol=1e-3)
        assert share.mean() > 0


def test_the_folder_says_what_it_is(edits):
    info = latents.read_info(edits)
    assert info["shards"] == 3 and info["records"] == 20 and info["config"]["source"]["name"] == "edit_64"
    assert info["vae"]["width"] == tiny.CONFIG.vae.width
    np.testing.assert_allclose(info["null_states"], [tiny.WordEncoder().state("")], rtol=1e-6)


def test_a_restart_makes_only_what_is_missing(edits, capsys):
    before, content = stamps(edits), contents(edits)
    encode(edits.parent, edits)
    assert "complete, 20 records" in capsys.readouterr().err and stamps(edits) == before
    kept = [shard(edits, i).name for i in (0, 2)]
    shard(edits, 1).unlink()
    (edits / "info.json").unlink()
    encode(edits.parent, edits)
    after = stamps(edits)
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert contents(edits) == content and after.keys() == before.keys()


def test_hosts_side_by_side_make_what_one_makes(root, edits):
    output = encode(root, root / "two", "--host", "1", "--hosts", "2")
    assert list(contents(output)) == [shard(edits, 1).name] and not (output / "info.json").exists()
    encode(root, output, "--host", "0", "--hosts", "2")
    assert contents(output) == contents(edits) and latents.read_info(output) == latents.read_info(edits)

    failures, together = [], root / "together"

    def work(host):
        try:
            encode(root, together, "--host", str(host), "--hosts", "3")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(host,)) for host in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and contents(together) == contents(edits)
    assert sorted(stamps(together)) == sorted([*stamps(edits), "checked"])


def test_other_settings_and_other_folders_are_refused(root, edits, tmp_path):
    with pytest.raises(UserError, match="made with other settings"):
        encode(root, edits, "--config.source.split=validation")
    other = tiny.write_vae(tmp_path / "other.safetensors")
    model_folder.save_vae(other, tiny.CONFIG.vae, tiny.vae_params(seed=1), {})
    with pytest.raises(UserError, match="made with other settings"):
        encode(root, edits, f"--config.vae={other}")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match=r"mine is not empty and was not made by precompute"):
        encode(root, tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_a_text_that_is_too_long_leaves_no_shard(root, tmp_path, monkeypatch):
    def refusing(self, requests, length=None):
        raise UserError("the prompt has 99 tokens and the limit is 64")

    monkeypatch.setattr(tiny.WordEncoder, "encode", refusing)
    with pytest.raises(UserError, match="99 tokens"):
        encode(root, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"made_of.json", "bad_records"}
    monkeypatch.undo()
    monkeypatch.setattr(load, "load_encoder", lambda *args, **options: tiny.WordEncoder())
    encode(root, tmp_path / "out", "--config.text.max_length=128")  # what wrote nothing blocks nothing


# --- raw pictures of many shapes


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """30 captioned pictures of three shapes, two of them damaged, and an autoencoder."""
    folder = tmp_path_factory.mktemp("shapes")
    raw_sets.write_folder(folder / "raw", 30, ((16, 16), (48, 16), (16, 48)))
    (folder / "raw" / "00004.png").write_bytes(b"no picture")
    (folder / "raw" / "00020.png").unlink()
    tiny.write_vae(folder / "vae.safetensors")
    return folder


def encode_shapes(root, output, *arguments):
    settings = {
        "source.kind": "folder",
        "source.path": root / "raw",
        "source.name": "''",
        "vae": root / "vae.safetensors",
        "buckets.size": 32,
        "buckets.multiple": 16,
        "buckets.max_ratio": 3,
        "max_bad_fraction": 0.1,
        "batch_size": 3,
        "shard_size": 8,
    }
    overrides = [f"--config.{key}={value}" for key, value in settings.items()]
    assert precompute.main(["--config", "configs/precompute.py", "--output", str(output), *overrides, *arguments]) == 0
    return output


def test_pictures_of_many_shapes_are_encoded_in_their_buckets_without_the_bad_ones(shapes, capsys):
    output = encode_shapes(shapes, shapes / "latents")
    assert "left out 2 records" in capsys.readouterr().err
    info, found = latents.read_info(output), examples(output)
    sizes = {0: (32, 32), 1: (48, 16), 2: (16, 48)}
    assert {tuple(size) for size in info["buckets"]} >= set(sizes.values())
    numbers = [int(example.text.split()[1]) for example in found]
    assert sorted(numbers) == [i for i in range(30) if i not in (4, 20)]
    for number, example, bucket in zip(numbers, found, np.load(output / info["bucket_table"]), strict=True):
        width, height = sizes[number % 3]
        assert example.size == (width, height) == tuple(info["buckets"][bucket])
        assert example.target.shape[:2] == (height // 4, width // 4)
    log = [json.loads(line) for line in (output / "bad_records" / "host_0.jsonl").read_text().splitlines()]
    assert [row["record"] for row in log] == ["metadata.jsonl line 5", "metadata.jsonl line 21"]

    halves = shapes / "halves"
    for host in ("1", "0"):
        encode_shapes(shapes, halves, "--host", host, "--hosts", "2")
    assert contents(halves) == contents(output) and latents.read_info(halves) == info
    assert (halves / info["bucket_table"]).read_bytes() == (output / info["bucket_table"]).read_bytes()
    with pytest.raises(UserError, match=r"records read cannot be used, more than the share max_bad_fraction 0 allows"):
        encode_shapes(shapes, shapes / "strict", "--config.max_bad_fraction=0")


def test_latents_of_many_shapes_are_read_in_batches_of_one(shapes):
    folder = shapes / "for_training"
    encode_shapes(shapes, folder)

    def start(host=0, hosts=1):
        sources = [SourceConfig(str(folder))]
        return iter(latents.mixture(sources, batch_size=4, text_length=8, seed=0, threads=1, host=host, hosts=hosts))

    whole, halves = start(), [start(host, 2) for host in range(2)]
    position = None
    for number in range(30):
        batch = next(whole)
        width, height = batch["size"][0]
        assert (batch["size"] == batch["size"][0]).all()
        assert batch["target"].shape == (4, int(height) // 4, int(width) // 4, 4) and np.isfinite(batch["text"]).all()
        parts = [next(half) for half in halves]
        assert all(np.array_equal(np.concatenate([p[key] for p in parts]), batch[key]) for key in batch)
        if number == 9:
            position = json.loads(json.dumps(whole.get_state()))
        if number == 10:
            expected = batch
    again = start()
    again.set_state(position)
    assert all(np.array_equal(value, expected[key]) for key, value in next(again).items())


def test_what_it_began_it_goes_on_with(shapes, tmp_path):
    """A quarter of the shards is missing: allowed that much, and with other threads, the same folder is made."""
    rows = [{"image": raw_sets.plain(i), "caption": f"number {i}"} for i in range(8)]
    raw_sets.write_shards(tmp_path / "raw", rows, shards=4)[1].unlink()
    output = tmp_path / "latents"

    def make(*more):
        source = {"kind": "array_record", "path": tmp_path / "raw", "name": "set"}
        overrides = (f"--config.source.{key}={value}" for key, value in source.items())
        return encode_shapes(shapes, output, "--config.buckets.max_ratio=1", *overrides, *more)

    with pytest.raises(UserError, match=r"1 shard\(s\) are missing .* more than max_bad_fraction 0.1 allows"):
        make()
    assert {path.name for path in output.iterdir()} == {"bad_records"}
    make("--config.max_bad_fraction=0.5", "--config.threads=1")
    with pytest.raises(UserError, match=r"made with other settings .*differ in config.batch_size; choose"):
        make("--config.max_bad_fraction=0.5", "--config.batch_size=4")
    assert [example.text for example in examples(output)] == [f"number {i}" for i in (0, 1, 4, 5, 6, 7)]
    (output / "made_of.json").write_text('{"config": ')
    with pytest.raises(UserError, match=r"made_of.json is not JSON"):
        make()
    (output / "info.json").write_text("")
    with pytest.raises(UserError, match=r"info.json is not JSON"):
        latents.read_info(output)


# --- run again after the source changed


class Counted(tiny.WordEncoder):
    """Counts the prompts that it encodes."""

    texts: list = []  # noqa: RUF012 (of all)

    def encode(self, requests, length=None):
        self.texts += [request.text for request in requests if request.text]
        return super().encode(requests, length)


@pytest.fixture
def counts(monkeypatch):
    """Prompts encoded, and pictures encoded, since they were last cleared."""
    texts, pictures, latents_of = [], [], encoding.Encoder.latents
    monkeypatch.setattr(Counted, "texts", texts)
    monkeypatch.setattr(load, "load_encoder", lambda *args, **options: Counted())
    counting = lambda self, images: pictures.extend(images) or latents_of(self, images)  # noqa: E731
    monkeypatch.setattr(encoding.Encoder, "latents", counting)
    return texts, pictures


def small(root, output, raw, *arguments):
    return encode_shapes(root, output, f"--config.source.path={raw}", "--config.shard_size=4", *arguments)


def rewritten(raw, change):
    rows = [json.loads(line) for line in (raw / "metadata.jsonl").read_text().splitlines()]
    change(rows)
    raw_sets.write_rows(raw, rows)


def word(index, text):
    return lambda rows: rows[index].update(caption=text)


def picture(index, content):
    return lambda raw: (raw / f"{index:05d}.png").write_bytes(content)


EDITS = {  # what is done to a folder of 12 records, and how many records are encoded, changed, added, removed
    "one word": (lambda raw: rewritten(raw, word(3, "another")), (1, 1, 0, 0)),
    "a picture of the same size": (picture(2, raw_sets.plain(200, (16, 48))), (1, 1, 0, 0)),
    "a picture that is turned": (picture(0, raw_sets.plain(0, (16, 48))), (1, 1, 0, 0)),
    "first is gone": (lambda raw: rewritten(raw, lambda rows: rows.pop(0)), (0, 0, 0, 1)),
    "another order": (lambda raw: rewritten(raw, lambda rows: rows.reverse()), (0, 0, 0, 0)),
    "touched": (lambda raw: (raw / "00001.png").touch(), (0, 0, 0, 0)),
    "one more at the front": (
        lambda raw: rewritten(raw, lambda rows: rows.insert(0, {"image": "00005.png", "caption": "more"})),
        (1, 0, 1, 0),
    ),
    "the same words once more": (lambda raw: rewritten(raw, lambda rows: rows.append(rows[4])), (0, 0, 0, 0)),
    "all words": (
        lambda raw: rewritten(raw, lambda rows: [r.update(caption=r["caption"] + "!") for r in rows]),
        (12, 12, 0, 0),
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_what_changed_is_encoded_again_and_the_rest_is_kept(shapes, tmp_path, counts, capsys, edit):
    raw, output = raw_sets.write_folder(tmp_path / "raw", 12, ((16, 16), (48, 16), (16, 48))), tmp_path / "latents"
    small(shapes, output, raw)
    assert len(counts[0]) == len(counts[1]) == 12
    capsys.readouterr()
    act, (encoded, *numbers) = EDITS[edit]
    act(raw)
    for values in counts:
        values.clear()
    small(shapes, output, raw)
    said = capsys.readouterr().err
    total = 12 + ("more" in edit) - ("gone" in edit)
    expected = "{} records changed, {} added, {} removed, {} kept".format(*numbers, total - encoded)
    assert expected in said and f"complete, {total} records" in said
    assert (len(counts[0]), len(counts[1])) == (encoded, encoded)
    assert whole(output) == whole(small(shapes, tmp_path / "fresh", raw))


def test_a_folder_half_done_before_an_edit_holds_the_source_alone(shapes, tmp_path, counts, capsys):
    """One host of two made its part; then words changed."""
    raw, output = raw_sets.write_folder(tmp_path / "raw", 12), tmp_path / "latents"
    small(shapes, output, raw, "--hosts", "2", "--host", "0")
    rewritten(raw, lambda rows: [word(i, "other")(rows) for i in (0, 5)])
    small(shapes, output, raw, "--hosts", "2", "--host", "1")
    assert not (output / "info.json").exists()
    assert "of 3 shards 1 are missing or of another state of the source, such as number 0 of --host 0" in (
        capsys.readouterr().err
    )
    for values in counts:
        values.clear()
    small(shapes, output, raw, "--hosts", "2", "--host", "0")
    assert counts[0] == ["other"] and latents.read_info(output)["records"] == 12
    fresh = small(shapes, tmp_path / "fresh", raw)
    assert {name: value for name, value in whole(output).items() if "checked" not in name} == whole(fresh)
    small(shapes, output, raw)  # and one host alone finds it as it should be
    assert whole(output) == whole(fresh) or whole(output).keys() - whole(fresh).keys() <= {
        f"checked/{i:05d}.json" for i in range(3)
    }


def test_a_picture_replaced_under_its_size_and_time_is_noticed(shapes, tmp_path, counts):
    raw, output = raw_sets.write_folder(tmp_path / "raw", 8), tmp_path / "latents"
    small(shapes, output, raw)
    path, counts[1][:] = raw / "00002.png", []
    stat, other = path.stat(), raw_sets.plain(77)
    path.write_bytes(other + b"\0" * (stat.st_size - len(other)))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    small(shapes, output, raw)
    assert len(counts[1]) == 1 and whole(output) == whole(small(shapes, tmp_path / "fresh", raw))


def test_what_was_bad_is_tried_again_and_what_is_mended_is_used(shapes, tmp_path, counts):
    raw, output = raw_sets.write_folder(tmp_path / "raw", 12), tmp_path / "latents"
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    good = raw_sets.encoded(Image.fromarray(noise))
    (raw / "00004.png").write_bytes(good[: len(good) // 2])  # its header can be read, its pixels cannot
    (raw / "00006.png").rename(tmp_path / "aside.png")
    rewritten(raw, word(8, " ".join(["many"] * 80)))

    def named():
        rows = (output / "bad_records" / "host_0.jsonl").read_text().splitlines()
        return [json.loads(row)["record"].split()[-1] for row in rows]

    for _ in range(2):
        small(shapes, output, raw, "--config.max_bad_fraction=0.5")
        assert sorted(named()) == ["5", "7", "9"] and len(counts[1]) == 9
        assert "the limit is 64" in (log := (output / "bad_records" / "host_0.jsonl").read_text())
        assert "config.text.max_length, now 64, sets the limit" in log
    assert whole(output) == whole(small(shapes, tmp_path / "fresh", raw, "--config.max_bad_fraction=0.5"))
    (raw / "00004.png").write_bytes(good)
    (tmp_path / "aside.png").rename(raw / "00006.png")
    rewritten(raw, word(8, "few"))
    counts[1].clear()
    small(shapes, output, raw, "--config.max_bad_fraction=0.5")
    assert len(counts[1]) == 3 and not (output / "bad_records" / "host_0.jsonl").exists()
    assert whole(output) == whole(small(shapes, tmp_path / "all", raw, "--config.max_bad_fraction=0.5"))


def test_a_folder_that_is_being_changed_is_not_trained_on(shapes, tmp_path, monkeypatch):
    """A kill in the middle of an update: neither the old set nor half of each."""
    raw, output = raw_sets.write_folder(tmp_path / "raw", 12), tmp_path / "latents"
    small(shapes, output, raw)
    rewritten(raw, lambda rows: [row.update(caption="new " + row["caption"]) for row in rows])
    put, calls = kept.Kept.put, []

    def stop(self, index, *rest):
        calls.append(index)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return put(self, index, *rest)

    monkeypatch.setattr(kept.Kept, "put", stop)
    with pytest.raises(KeyboardInterrupt):
        small(shapes, output, raw)
    with pytest.raises(UserError, match="no complete set of latents"):
        latents.read_info(output)
    monkeypatch.setattr(kept.Kept, "put", put)
    small(shapes, output, raw)
    assert whole(output) == whole(small(shapes, tmp_path / "fresh", raw))


@pytest.mark.parametrize("damage", ["shard", "manifest", "table", "info"])
def test_what_was_damaged_is_made_again(shapes, tmp_path, counts, damage):
    raw, output = raw_sets.write_folder(tmp_path / "raw", 12), tmp_path / "latents"
    small(shapes, output, raw)
    before = whole(output)
    if damage == "shard":
        path = shard(output, 1)
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "manifest":
        next((output / "made_from").glob("latents-00001-*")).write_text('{"records": [')
    elif damage == "table":
        next(output.glob("buckets-*")).unlink()
    else:
        (output / "info.json").unlink()
    counts[1].clear()
    small(shapes, output, raw)
    assert whole(output) == before
    assert len(counts[1]) == (4 if damage in ("shard", "manifest") else 0)


def test_a_folder_of_an_older_version_is_left_and_said_to_be_unchecked(shapes, tmp_path, capsys):
    raw, output = raw_sets.write_folder(tmp_path / "raw", 4), tmp_path / "latents"
    small(shapes, output, raw)
    info = json.loads((output / "info.json").read_text())
    shard(output, 0).rename(latents.shard_path(output, 0, 1))
    old = {"format", "shards", "config", "vae_sha256", "records", "vae", "null_tail", "null_states", "buckets"}
    (output / "info.json").write_text(json.dumps({name: info[name] for name in old}))
    next(output.glob("buckets-*.npy")).rename(output / "buckets.npy")
    shutil.rmtree(output / "made_from")
    before = whole(output)
    small(shapes, output, raw)
    said = capsys.readouterr().err
    assert "made by an older version" in said and "cannot be held to its source" in said and whole(output) == before
    assert len(examples(output)) == 4
    (output / "info.json").unlink()  # half done: made anew
    small(shapes, output, raw)
    assert whole(output) == whole(small(shapes, tmp_path / "fresh", raw))


@pytest.mark.parametrize("value", [np.inf, np.nan, 7e4, -1e6])
def test_latents_that_cannot_be_kept_are_refused_by_name(shapes, tmp_path, monkeypatch, value):
    raw, output = raw_sets.write_folder(tmp_path / "raw", 6), tmp_path / "latents"
    latents_of, seen = encoding.Encoder.latents, []

    def broken(self, images):
        found = np.array(latents_of(self, images))
        seen.extend(images)
        if len(seen) == 6:
            found[-1, 0, 0, 0] = value
        return found

    monkeypatch.setattr(encoding.Encoder, "latents", broken)
    says = {np.inf: "0 NaN and 1 infinite", 7e4: "largest finite one is 70000", -1e6: "is 1e.06"}.get(
        value, "1 NaN and 0"
    )
    with pytest.raises(UserError, match=rf"metadata.jsonl line 6 \(00005.png\): latents of the target hold .*{says}"):
        small(shapes, output, raw)
    assert not (output / "info.json").exists() and not list(output.glob("*.tmp"))


def test_states_that_cannot_be_kept_are_refused_by_name(shapes, tmp_path, monkeypatch):
    state = tiny.WordEncoder.state
    monkeypatch.setattr(tiny.WordEncoder, "state", lambda self, word: state(self, word) * (1e6 if word == "2" else 1))
    raw = raw_sets.write_folder(tmp_path / "raw", 4)
    with pytest.raises(UserError, match=r"metadata.jsonl line 3 \(00002.png\): states hold 0 NaN"):
        small(shapes, tmp_path / "latents", raw)


def test_sizes_that_the_autoencoder_cannot_take_are_refused(shapes, tmp_path):
    with pytest.raises(UserError, match=r"gives pictures of .*; the autoencoder needs multiples of 4 pixels"):
        encode_shapes(shapes, tmp_path / "x", "--config.buckets.size=15", "--config.buckets.multiple=5")


@pytest.mark.parametrize(
    ("argument", "source"),
    [
        ("edit_64", SourceConfig("runs/quickstart/data", name="edit_64")),
        ("folder,photos", SourceConfig("photos", kind="folder")),
        ("array_record,/data/photos,train", SourceConfig("/data/photos", kind="array_record", name="train")),
        ("tfds,/data,coco_captions:1.1.0", SourceConfig("/data", kind="tfds", name="coco_captions:1.1.0")),
    ],
)
def test_the_config_takes_every_kind_of_source(argument, source):
    config = load_config(f"configs/precompute.py:{argument}", cls=PrecomputeConfig)
    assert config.source == source and (config.buckets.size == 256) == (source.form != "sprites")
    with pytest.raises(UserError, match="kind 'files' is not one of folder, array_record, tfds"):
        load_config("configs/precompute.py:files,photos", cls=PrecomputeConfig)
