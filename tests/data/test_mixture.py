"""Batches of raw sources: exact, deterministic, alike for any number of hosts, resumable, unharmed by bad records."""

import itertools
import json
import os
import shutil

import numpy as np
import pytest
import raw_sets
import tiny
from PIL import Image

from dreamlite_jax.data import transforms
from dreamlite_jax.data.config import BucketConfig, DataConfig, SourceConfig
from dreamlite_jax.data.forms import Images, Pairs
from dreamlite_jax.data.index import source_digest
from dreamlite_jax.data.mixture import raw_batches
from dreamlite_jax.data.reading import substitutes
from dreamlite_jax.data.sources import open_source
from dreamlite_jax.errors import UserError

SQUARE = BucketConfig(size=16, multiple=16)
SHAPES = BucketConfig(size=32, multiple=16, max_ratio=3.0)  # 48x16, 32x32 and 16x48, among others
SIZES = ((16, 16), (48, 16), (16, 48))  # of the pictures


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two folders: records 0 to 1199 of three shapes, and 5000 to 5299, squares alone."""
    folder = tmp_path_factory.mktemp("mixture")
    raw_sets.write_folder(folder / "many", 1200, SIZES)
    raw_sets.write_folder(folder / "few", 300, first=5000)
    return folder


def batches(folders, weights=None, buckets=SQUARE, *, batch_size=8, host=0, hosts=1, log=None, seed=0, **options):
    weights = weights or [1.0] * len(folders)
    sources = [SourceConfig(str(f), w, kind="folder") for f, w in zip(folders, weights, strict=True)]
    data = DataConfig(tuple(sources), batch_size, buckets=buckets, **options)
    return raw_batches(data, Images, seed=seed, host=host, hosts=hosts, log=log)


def ids(batch):
    return [raw_sets.number(picture) for picture in batch["image"]]


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def saved(iterator):
    return json.loads(json.dumps(iterator.get_state()))  # as a checkpoint keeps it


@pytest.mark.parametrize("buckets", [SQUARE, SHAPES], ids=["one", "several"])
def test_a_run_resumed_within_an_epoch_reads_the_same_thousand_samples_on_1_2_and_4_hosts(root, buckets):
    def start(host, hosts):
        return iter(batches([root / "many", root / "few"], [3.0, 1.0], buckets, batch_size=40, host=host, hosts=hosts))

    alone = start(0, 1)
    before = [i for batch in take(alone, 13) for i in ids(batch)]  # a third of an epoch
    position = saved(alone)
    expected = [ids(batch) for batch in take(alone, 25)]
    assert len(set(before)) == 520 and sum(map(len, expected)) == 1000
    for hosts in (1, 2, 4):
        iterators = [start(host, hosts) for host in range(hosts)]
        for iterator in iterators:
            iterator.set_state(position)
        found = [[i for iterator in iterators for i in ids(next(iterator))] for _ in range(25)]
        assert found == expected
        assert all(saved(iterator) == saved(alone) for iterator in iterators)


def test_processes_and_threads_read_the_same(root):
    expected = [ids(batch) for batch in take(iter(batches([root / "few"])), 4)]
    with_processes = iter(batches([root / "few"], processes=2, threads=1))
    assert [ids(batch) for batch in take(with_processes, 4)] == expected
    with_processes.close()
    assert [ids(batch) for batch in take(iter(batches([root / "few"], threads=3)), 4)] == expected
    assert [ids(batch) for batch in take(iter(batches([root / "few"], seed=1)), 4)] != expected


def test_every_batch_is_of_one_shape_and_every_sample_comes_once_an_epoch(root):
    plan = batches([root / "many", root / "few"], [4.0, 1.0], SHAPES).plan()
    seen, shapes = [], set()
    for _ in range(200):
        bucket, samples = plan.next()
        shapes.add(bucket)
        kinds = {0 if source else index % 3 for source, index in samples.tolist()}
        assert len(kinds) == 1 and len(samples) == 8
        seen += map(tuple, samples.tolist())
    assert len(shapes) == 3
    # What was given out and what lies on piles is the beginning of the stream, each sample once.
    state = plan.state()
    waiting = plan.stream.samples(np.asarray(state["waiting"])).tolist()
    stream = plan.stream.samples(np.arange(state["next"])).tolist()
    assert sorted([*seen, *map(tuple, waiting)]) == sorted(map(tuple, stream))
    assert len(waiting) < 3 * 8
    first_epoch = [index for source, index in stream if source == 0][:1200]
    assert sorted(first_epoch) == list(range(1200))


def test_pictures_are_cut_to_the_shape_of_their_batch(root):
    for batch in take(iter(batches([root / "many"], buckets=SHAPES)), 6):
        kinds = {i % 3 for i in ids(batch)}
        width, height = {0: (32, 32), 1: (48, 16), 2: (16, 48)}[kinds.pop()]
        assert batch["image"].shape == (8, height, width, 3) and not kinds
        assert batch["image"].dtype == np.float32


def looks(folder, monkeypatch):
    """Buckets that a folder's pictures are trained in, by record, and how many headers were read to know them."""
    read, size = [], transforms.picture_size
    monkeypatch.setattr(transforms, "picture_size", lambda encoded: read.append(1) or size(encoded))
    found = batches([folder], buckets=SHAPES)
    monkeypatch.setattr(transforms, "picture_size", size)
    return [found.reader.sizes[bucket] for bucket in found.reader.bucket_of[0]], len(read)


def replace(path, content):
    """The same name, size and time of change, other bytes."""
    stat = path.stat()
    path.write_bytes(content.ljust(stat.st_size, b"\0"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)


def test_only_pictures_that_changed_are_looked_at_again(tmp_path, monkeypatch, capsys):
    folder = raw_sets.write_folder(tmp_path / "set", 12, SIZES)
    expected = [{(16, 16): (32, 32)}.get(SIZES[i % 3], SIZES[i % 3]) for i in range(12)]
    for count in (12, 0):
        assert looks(folder, monkeypatch) == (expected, count)
    (index,) = (folder / ".dreamlite_index").iterdir()
    stamp = index.stat().st_mtime_ns

    rows = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "metadata.jsonl").write_text("\n".join(reversed(rows)))  # another order, nothing else
    assert looks(folder, monkeypatch) == (expected[::-1], 0) and index.stat().st_mtime_ns == stamp
    (folder / "metadata.jsonl").write_text("\n".join(rows))

    (folder / "00000.png").write_bytes(raw_sets.plain(0, (48, 16)))
    expected[0] = (48, 16)
    assert looks(folder, monkeypatch) == (expected, 1)
    large = raw_sets.encoded(Image.new("RGB", (48, 16)), compress_level=0)
    (folder / "00001.png").write_bytes(large)
    looks(folder, monkeypatch)
    replace(folder / "00001.png", raw_sets.plain(1, (16, 48)))
    expected[1] = (16, 48)
    assert looks(folder, monkeypatch) == (expected, 1)
    turned = Image.Exif()
    turned[0x0112] = 6
    (folder / "00002.png").write_bytes(raw_sets.encoded(Image.new("RGB", (16, 48)), exif=turned))
    expected[2] = (48, 16)
    assert looks(folder, monkeypatch) == (expected, 1)


def test_a_picture_that_was_missing_or_damaged_is_looked_at_when_it_is_there(tmp_path, monkeypatch, capsys):
    """A stand-in's shape is no picture's own."""
    folder = raw_sets.write_folder(tmp_path / "set", 8, [(16, 16)])
    whole = raw_sets.plain(3, (20, 60))
    (folder / "00003.png").unlink()
    (folder / "00005.png").write_bytes(b"torn")
    assert set(looks(folder, monkeypatch)[0]) == {(32, 32)}
    (folder / "00003.png").write_bytes(whole)
    (folder / "00005.png").write_bytes(whole)
    sizes, count = looks(folder, monkeypatch)
    assert sizes[3] == sizes[5] == (16, 48) and count == 2


@pytest.mark.parametrize("damage", [b"", b"PK no archive", None, "other"])
def test_a_damaged_index_is_made_again(tmp_path, monkeypatch, capsys, damage):
    folder = raw_sets.write_folder(tmp_path / "set", 6, SIZES)
    expected, _ = looks(folder, monkeypatch)
    (index,) = (folder / ".dreamlite_index").iterdir()
    if damage == "other":
        np.savez(index, keys=np.zeros((2, 16)), sizes=np.zeros((2, 2)))
    else:
        index.write_bytes(index.read_bytes()[:-40] if damage is None else damage)
    assert looks(folder, monkeypatch) == (expected, 6)
    assert f"{index} is damaged" in capsys.readouterr().err
    assert looks(folder, monkeypatch) == (expected, 0)


def test_shards_that_changed_are_looked_at_again(tmp_path, monkeypatch):
    def write(shapes):
        rows = [{"image": raw_sets.plain(i, shape), "caption": f"number {i}"} for i, shape in enumerate(shapes)]
        raw_sets.write_shards(tmp_path / "set", rows, shards=2)
        source = SourceConfig(str(tmp_path / "set"), kind="array_record")
        found = raw_batches(DataConfig((source,), 2, buckets=SHAPES), Images, seed=0)
        return [found.reader.sizes[bucket] for bucket in found.reader.bucket_of[0]]

    assert write([(48, 16), (16, 48)]) == [(48, 16), (16, 48)]
    assert write([(16, 48), (48, 16)]) == [(16, 48), (48, 16)]  # shards of the same names and lengths


def test_what_becomes_of_pictures_is_said_and_a_source_may_set_limits(tmp_path, capsys):
    folder = raw_sets.write_folder(tmp_path / "set", 8, [(64, 64)])
    (folder / "00002.png").write_bytes(raw_sets.plain(2, (8, 9)))
    (folder / "00006.png").write_bytes(raw_sets.plain(6, (1200, 60)))
    batches([folder], buckets=SHAPES)
    said = capsys.readouterr().err
    assert "set: 8 records: 48x16 1, 32x32 7" in said
    assert "cut off on average, at most 85.0% (metadata.jsonl line 7)" in said
    assert "1 enlarged, at most 4.0 times (metadata.jsonl line 3)" in said
    assert "warning: 1 lose more than half, 1 are enlarged more than twice" in said
    for buckets in (SHAPES, SQUARE):
        source = SourceConfig(str(folder), kind="folder", least_side=20, most_cut=0.8)
        data = DataConfig((source,), 4, buckets=buckets, max_bad_fraction=0.5)
        log = tmp_path / f"{buckets.size}.jsonl"
        found = take(iter(raw_batches(data, Images, seed=0, log=log)), 4)
        assert {i for batch in found for i in ids(batch)} == {0, 1, 3, 4, 5, 7}
        assert "2 beyond least_side 20 or most_cut 0.8" in capsys.readouterr().err
        reasons = {row["record"]: row["reason"] for row in map(json.loads, log.read_text().splitlines())}
        assert "8x9 pixels, a side below the source's least_side 20" in reasons["metadata.jsonl line 3"]
        assert "would be cut off" in reasons["metadata.jsonl line 7"] and len(reasons) == 2


def test_bad_records_are_replaced_counted_and_named(tmp_path):
    folder, log = raw_sets.write_folder(tmp_path / "set", 40), tmp_path / "log" / "bad.jsonl"
    good = [ids(batch) for batch in take(iter(batches([folder])), 10)]
    (folder / "00003.png").unlink()
    (folder / "00007.png").write_bytes((folder / "00007.png").read_bytes()[:-30])
    rows = (folder / "metadata.jsonl").read_text().splitlines()
    rows[20] = json.dumps({"image": "00020.png", "caption": " "})
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    bad = {3, 7, 20}

    def start(host=0, hosts=1):
        return iter(batches([folder], max_bad_fraction=0.5, log=log, host=host, hosts=hosts))

    iterator = start()
    found = [ids(batch) for batch in take(iterator, 10)]
    for a, b in zip(itertools.chain(*good), itertools.chain(*found), strict=True):
        assert (a == b) if a not in bad else (b not in bad)
    named = [json.loads(line) for line in log.read_text().splitlines()]
    assert {row["record"] for row in named} == {f"metadata.jsonl line {i + 1}" for i in bad} and len(named) == 3
    reasons = sorted(row["reason"] for row in named)
    assert "00003.png: No such file" in reasons[0] and "picture cannot be used" in reasons[1] and "empty" in reasons[2]

    # The stand-ins are the same for other host counts, and after a restart, which names nobody twice.
    halves = [start(host, 2) for host in range(2)]
    assert [[i for half in halves for i in ids(next(half))] for _ in range(10)] == found
    half_way = start()
    take(half_way, 4)
    resumed = start()
    resumed.set_state(saved(half_way))
    assert [ids(batch) for batch in take(resumed, 6)] == found[4:]
    assert len(log.read_text().splitlines()) == 3


def test_too_many_bad_records_stop_the_run(tmp_path):
    folder = raw_sets.write_folder(tmp_path / "set", 40)
    for i in range(0, 40, 4):
        (folder / f"{i:05d}.png").write_bytes(b"no picture")
    iterator = iter(batches([folder], max_bad_fraction=0.1, log=tmp_path / "bad.jsonl"))
    with pytest.raises(UserError, match=r"5 of \d+ records read cannot be used, .* 0.1 allows: .*metadata.jsonl line"):
        take(iterator, 100)
    for path in folder.glob("*.png"):
        path.unlink()
    with pytest.raises(UserError, match=r"none of 40 records tried in a row can be used: metadata.jsonl line"):
        next(iter(batches([folder], max_bad_fraction=1.0)))


def test_damaged_shards_are_left_out_or_stop_the_run(tmp_path):
    rows = [{"image": raw_sets.plain(i), "caption": f"number {i}"} for i in range(60)]
    paths = raw_sets.write_shards(tmp_path / "set", rows, shards=6)
    source = SourceConfig(str(tmp_path / "set"), kind="array_record")

    def start(fraction):
        data = DataConfig((source,), 5, buckets=SQUARE, max_bad_fraction=fraction)
        return iter(raw_batches(data, Images, seed=0, log=tmp_path / "bad.jsonl"))

    whole = start(0.2)
    take(whole, 2)
    position = saved(whole)
    content = bytearray(paths[1].read_bytes())
    middle = content.index(b"number 14")
    content[middle : middle + 9] = b"\0" * 9  # within one record of shard 1
    paths[1].write_bytes(content)
    seen = [i for batch in take(start(0.2), 24) for i in ids(batch)]
    assert set(seen) == set(range(60)) - {14} and len(seen) == 120
    assert [json.loads(line)["record"] for line in (tmp_path / "bad.jsonl").read_text().splitlines()] == [
        "set-00001-of-00006.array_record[4]"
    ]

    os.truncate(paths[4], 5000)
    assert 40 not in {i for batch in take(start(0.2), 20) for i in ids(batch)}
    assert "set-00004-of-00006.array_record" in (tmp_path / "bad.jsonl").read_text()
    with pytest.raises(UserError, match=r"1 shard\(s\) are missing or damaged, such as set-00004.* 16.7% of it"):
        start(0.1)
    with pytest.raises(
        UserError, match=r"sources\[0\] \(.*\) has 50 records, had 60\. Restore them \(a missing shard counts\)"
    ):
        start(0.2).set_state(position)


def test_pairs_are_cut_alike_and_weigh_what_changes(tmp_path):
    rng = np.random.default_rng(0)
    source = rng.integers(0, 255, (40, 64, 3), np.uint8)
    target = source.copy()
    target[:, 32:40] = 255 - target[:, 32:40]
    mask = Image.new("L", (64, 40))
    mask.paste(255, (32, 0, 48, 40))
    for name, picture in {"s.png": source, "t.png": target}.items():
        (tmp_path / name).write_bytes(raw_sets.encoded(Image.fromarray(picture)))
    mask.save(tmp_path / "m.png")
    edit = {"source": "s.png", "instruction": "swap", "target": "t.png"}
    raw_sets.write_rows(tmp_path, [edit])

    def batch():
        sources = (SourceConfig(str(tmp_path), kind="folder"),)
        data = DataConfig(sources, 2, buckets=BucketConfig(size=32, multiple=8))
        return next(iter(raw_batches(data, lambda sizes: Pairs(sizes, 8), seed=0)))

    found = batch()
    # The central 40x40 of 64x40: columns 12 to 52, at 32 px. The change, columns 32 to 40, is columns 16 to 22.4 there.
    expected = Image.fromarray(target[:, 12:52]).resize((32, 32), Image.Resampling.BICUBIC)
    inner = slice(1, -1)  # at the edge of the crop the filter sees what lies beyond
    expected = (np.asarray(expected) / 127.5 - 1)[:, inner]
    np.testing.assert_allclose(found["target_image"][0, :, inner], expected, atol=0.02)
    differs = np.abs(found["target_image"] - found["source_image"])[0].max(-1)
    assert (differs[:, :14] == 0).all() and (differs[:, 25:] == 0).all() and differs[:, 17:22].mean() > 0.2
    assert (found["weight"][0, :, :1] == 1).all() and (found["weight"][0, :, 2] > 2).all()
    assert found["editing"].tolist() == [1, 1] and found["size"].tolist() == [[32, 32]] * 2

    raw_sets.write_rows(tmp_path, [edit | {"mask": "m.png"}])
    weight = batch()["weight"][0, :, :, 0]  # columns 16 to 28.8 of 32: cells 2 and 3
    assert (weight[:, :2] == 1).all() and (weight[:, 2:] == weight[0, 2]).all()
    assert weight[0, 2] == pytest.approx(1 + np.log2(32 / 13), abs=0.1)


def test_a_prompt_that_the_encoder_refuses_makes_its_record_a_bad_one(tmp_path):
    folder = raw_sets.write_folder(tmp_path / "set", 20)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows[11]["caption"] = " ".join(["many"] * 30)
    raw_sets.write_rows(folder, rows)
    data = DataConfig(
        (SourceConfig(str(folder), kind="folder"),), 5, buckets=SQUARE, text_length=8, max_bad_fraction=0.2
    )
    log, encoder = tmp_path / "bad.jsonl", tiny.WordEncoder()
    found = raw_batches(data, lambda sizes: Pairs(sizes, 8), seed=0, log=log, encoder=encoder)
    for batch in take(iter(found), 4):
        numbers = [raw_sets.number(picture) for picture in batch["target_image"]]
        assert 11 not in numbers and batch["text"].shape == (5, 8, tiny.TEXT_DIM)
        for row, number in enumerate(numbers):  # "", the tag, "number" and the number
            assert np.array_equal(batch["text"][row, 3], encoder.state(str(number)))
            assert batch["mask"][row].tolist() == [1] * 4 + [0] * 4
    (row,) = [json.loads(line) for line in log.read_text().splitlines()]
    assert row["record"] == "metadata.jsonl line 12" and "32 tokens and the limit is 8" in row["reason"]
    assert "config.data.text_length and config.model.text.max_length set the limit" in row["reason"]


def test_a_size_is_needed_where_pictures_have_many(root):
    with pytest.raises(
        UserError, match=r"config.data.buckets.size is 0; pictures other than sprites of one size need one"
    ):
        batches([root / "few"], buckets=BucketConfig())
    with pytest.raises(UserError, match="batch_size 8 is not a multiple of the 3 hosts"):
        batches([root / "few"], hosts=3)


def test_substitutes_go_through_all_of_a_bucket():
    assert sorted(substitutes(5, 0, 12, None)) == list(range(12))
    table = np.asarray([0, 1] * 6)
    assert next(substitutes(5, 1, 12, table)) == 5 and set(substitutes(5, 1, 12, table)) == {1, 3, 5, 7, 9, 11}
    assert list(substitutes(0, 0, 1, None)) == [0]


def test_the_digest_of_a_source_is_that_of_its_words_and_files(tmp_path):
    """A copy has the same; another word, another picture or another order has another."""

    def digest(folder):
        return source_digest(open_source(SourceConfig(str(folder), kind="folder")))

    folder = raw_sets.write_folder(tmp_path / "set", 6)
    first = digest(folder)
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    assert digest(tmp_path / "copy") == first
    (folder / "00001.png").touch()
    assert digest(folder) == first
    seen = {first}
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for changed in (rows[::-1], rows[1:], [*rows[:-1], rows[-1] | {"caption": "x"}]):
        raw_sets.write_rows(folder, changed)
        seen.add(digest(folder))
    raw_sets.write_rows(folder, rows)
    (folder / "00001.png").write_bytes(raw_sets.plain(1, (40, 16)))
    seen.add(digest(folder))
    (folder / "00002.png").unlink()
    assert len({*seen, digest(folder)}) == 6
