"""The dataset on disk: written and read without TensorFlow, reused, redone, refused."""

import collections
import pickle
import subprocess
import sys

import numpy as np
import pytest

from dreamlite_jax.data.sprites import builder, catalog, edits, render, scenes
from dreamlite_jax.errors import UserError

COUNTS = {"train": 48, "validation": 24, "heldout": 20}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sprites")
    for task in builder.TASKS:
        builder.prepare(folder, task, 64, COUNTS, seed=3)
    return folder


def _records(data_dir, task, split):
    source = builder.open_split(data_dir, task, 64, split)
    return [builder.decode(source[i]) for i in range(len(source))]


@pytest.mark.parametrize("task", builder.TASKS)
@pytest.mark.parametrize("split", scenes.SPLITS)
def test_round_trip_without_tensorflow(data_dir, task, split):
    records = _records(data_dir, task, split)
    samples = {sample.id: sample for sample in builder.samples(task, split, COUNTS[split], seed=3)}
    assert sorted(record["id"] for record in records) == sorted(samples)
    for record in records:
        sample = samples[record["id"]]
        assert (record["text"], record["tag"], record["scene"]) == (sample.text, sample.tag, sample.target)
        assert record["source_scene"] == sample.source
        assert record["target"].dtype == np.uint8
        assert np.array_equal(record["target"], render.render(sample.target, 64))
        if task == "edit":
            assert record["task"] == "edit"
            assert np.array_equal(record["source"], render.render(sample.source, 64))
        else:
            assert record["task"] == "generate" and record["source"] is None and record["source_scene"] is None


def test_nothing_of_it_needs_tensorflow(tmp_path):
    code = """
import importlib.machinery, sys

class Without(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] == "tensorflow" else super().find_spec(name, path, target)

# As if it were not installed, whether it is or not.
sys.meta_path = [Without if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
from dreamlite_jax.data.sprites import builder
builder.prepare(sys.argv[1], "edit", 64, {"train": 4, "validation": 4, "heldout": 4})
print(builder.decode(builder.open_split(sys.argv[1], "edit", 64, "train")[3])["task"])
assert "tensorflow" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == "edit"


def test_source_can_be_pickled_for_worker_processes(data_dir):
    source = builder.open_split(data_dir, "t2i", 64, "validation")
    assert pickle.loads(pickle.dumps(source))[7] == source[7]


def test_splits_are_balanced_distinct_and_disjoint():
    in_training, heldout_pairs = set(), catalog.HELD_OUT_COLOURS | catalog.HELD_OUT_POSITIONS
    for task in builder.TASKS:
        trained = list(builder.samples(task, "train", 960))
        assert len({(s.target, s.source, s.text) for s in trained}) == len(trained)
        for sample in trained:
            for scene in filter(None, (sample.target, sample.source)):
                in_training.add(scene)
                for item in scene.objects:
                    assert not {(item.name, item.colour), (item.name, item.position)} & heldout_pairs
    for task in builder.TASKS:
        for split in ("validation", "heldout"):
            drawn = list(builder.samples(task, split, 240))
            assert not {sample.target for sample in drawn} & in_training
            assert len({(s.target, s.source, s.text) for s in drawn}) == len(drawn)
            tags = collections.Counter(sample.tag for sample in drawn)
            assert set(tags) == set(builder.tags_of(task, split)) and len(set(tags.values())) == 1
    assert builder.tags_of("t2i", "train") == scenes.TAGS and builder.tags_of("edit", "train") == edits.OPERATIONS


def test_samples_depend_on_the_seed_only():
    first = list(builder.samples("edit", "train", 40, seed=5))
    assert first == list(builder.samples("edit", "train", 80, seed=5))[:40]
    assert first != list(builder.samples("edit", "train", 40, seed=6))


def _stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_finished_dataset_is_reused_and_broken_one_redone(tmp_path):
    counts = {"train": 12, "validation": 8, "heldout": 8}
    folder = builder.prepare(tmp_path, "t2i", 64, counts)
    stamps, bytes_before = _stamps(folder), {path.name: path.read_bytes() for path in folder.glob("*array_record*")}
    assert builder.prepare(tmp_path, "t2i", 64, counts) == folder and _stamps(folder) == stamps
    leftover = folder.parent / f"incomplete.ABCDEF_{folder.name}"
    leftover.mkdir()
    next(folder.glob("*train*")).unlink()
    with pytest.raises(UserError, match="prepare"):
        builder.open_split(tmp_path, "t2i", 64, "train")
    builder.prepare(tmp_path, "t2i", 64, counts)
    assert not leftover.exists()
    assert {path.name: path.read_bytes() for path in folder.glob("*array_record*")} == bytes_before


def test_interrupted_writing_leaves_nothing_that_looks_finished(tmp_path, monkeypatch):
    counts = {"train": 12, "validation": 8, "heldout": 8}
    whole = builder.samples

    def cut_short(task, split, count, seed=0):
        yield from whole(task, split, 5, seed)
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(builder, "samples", cut_short)
        with pytest.raises(OSError, match="disk full"):
            builder.prepare(tmp_path, "edit", 64, counts)
    with pytest.raises(UserError, match="no finished dataset"):
        builder.open_split(tmp_path, "edit", 64, "train")
    builder.prepare(tmp_path, "edit", 64, counts)
    assert len(builder.open_split(tmp_path, "edit", 64, "train")) == 12


def test_other_counts_or_seed_in_the_same_place_are_refused(data_dir):
    with pytest.raises(UserError, match=r"seed 3 \(asked: 4\)"):
        builder.prepare(data_dir, "t2i", 64, COUNTS, seed=4)
    with pytest.raises(UserError, match="counts"):
        builder.prepare(data_dir, "t2i", 64, {**COUNTS, "train": 49}, seed=3)


@pytest.mark.parametrize("size", [128, 256])
def test_larger_pictures_show_the_same_scenes(size):
    sample = next(builder.samples("edit", "train", 1))
    record = builder.decode(builder.encode(sample, size))
    assert record["target"].shape == record["source"].shape == (size, size, 3)
    assert (record["scene"], record["source_scene"]) == (sample.target, sample.source)
    small = render.render(sample.target, 64).astype(float)
    blocks = record["target"].reshape(64, size // 64, 64, size // 64, 3).mean((1, 3))
    assert np.abs(blocks - small).mean() < 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"task": "t2v"}, "task"),
        ({"size": 96}, "size"),
        ({"size": 192}, "size"),
        ({"size": "64"}, "size"),
        ({"counts": {"test": 3}}, "test"),
        ({"counts": {"train": 0}}, "train"),
        ({"counts": {"train": 2.5}}, "train"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, arguments, says):
    with pytest.raises(UserError, match=says):
        builder.prepare(tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


def test_bad_split_and_missing_dataset_are_refused(data_dir, tmp_path):
    with pytest.raises(UserError, match="split"):
        builder.open_split(data_dir, "t2i", 64, "test")
    with pytest.raises(UserError, match="no finished dataset"):
        builder.open_split(tmp_path, "t2i", 64, "train")


def test_attribution_travels_with_the_data(data_dir):
    for name in ("dataset_info.json", "LICENSE"):
        text = (data_dir / "sprites" / "t2i_64" / "1.1.0" / name).read_text()
        assert "Twemoji" in text and "CC-BY 4.0" in text
