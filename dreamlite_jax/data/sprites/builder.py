"""The sprites as a tensorflow-datasets builder: ArrayRecord files, written and read without TensorFlow.

    prepare("data", task="t2i", size=64)                 # writes data/sprites/t2i_64/1.1.0, or finds it there
    source = open_split("data", "t2i", 64, "train")      # len(source), source[i]: random access, as grain wants it
    decode(source[0])["target"]                          # (64, 64, 3) uint8

Pictures are stored as encoded PNG: the Image feature of tensorflow-datasets needs TensorFlow to write.
"""

import contextlib
import dataclasses
import fcntl
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from dreamlite_jax.data.sprites.captions import caption
from dreamlite_jax.data.sprites.edits import HELD_OUT_OPERATIONS, OPERATIONS, sample_edit, split_of_edit
from dreamlite_jax.data.sprites.render import check_size, render
from dreamlite_jax.data.sprites.scenes import HELD_OUT_TAGS, SPLITS, TAGS, Scene, sample_scene, split_of
from dreamlite_jax.errors import UserError

TASKS: tuple[str, ...] = ("t2i", "edit")
SIZES: tuple[int, ...] = (64, 128, 256)
DEFAULT_COUNTS: Mapping[str, int] = {"train": 16_000, "validation": 1_000, "heldout": 1_000}
_RELEASE = "1.1.0"
_TRIES = 20_000  # draws for one record before a split counts as exhausted

_DESCRIPTION = """\
Scenes of one to four emoji sprites with captions that determine the picture (t2i) and with editing instructions that
determine the edited picture (edit). `tag` is one of GenEval's six kinds of prompt or one of eight editing operations.
Split heldout shows (object, colour) and (object, position) combinations that the other splits never show.
Graphics: Twemoji, copyright Twitter, Inc. and other contributors, licensed under CC-BY 4.0; scaled and recoloured.
"""
_LICENSE = """\
Graphics: Twemoji (https://github.com/jdecked/twemoji), copyright Twitter, Inc. and other contributors, scaled and
recoloured. Licensed under CC-BY 4.0: https://creativecommons.org/licenses/by/4.0/
"""
_CITATION = """\
@misc{twemoji,
  title = {Twemoji},
  author = {{Twitter, Inc. and other contributors}},
  howpublished = {\\url{https://github.com/jdecked/twemoji}},
  note = {Graphics licensed under CC-BY 4.0, https://creativecommons.org/licenses/by/4.0/}
}
"""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One record before rendering. `source` is None for text-to-image."""

    id: str
    tag: str
    text: str
    target: Scene
    source: Scene | None = None


def _check(task: str, size: int, counts: Mapping[str, int] | None, seed: int) -> dict[str, int]:
    if task not in TASKS:
        raise UserError(f"task is {task!r}; one of {', '.join(TASKS)} would be right")
    if check_size(size) not in SIZES:
        raise UserError(f"size is {size}; one of {', '.join(map(str, SIZES))} would be right")
    counts = {**DEFAULT_COUNTS, **(counts or {})}
    for split, count in counts.items():
        if split not in SPLITS:
            raise UserError(f"counts has a split {split!r}; the splits are {', '.join(SPLITS)}")
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise UserError(f"counts[{split!r}] is {count!r}; a positive integer would be right")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UserError(f"seed is {seed!r}; an integer of at least 0 would be right")
    return {split: int(counts[split]) for split in SPLITS}


def tags_of(task: str, split: str) -> tuple[str, ...]:
    """The tags or operations that a split is balanced over. Not every one can show a held-out combination."""
    if task == "t2i":
        return HELD_OUT_TAGS if split == "heldout" else TAGS
    return HELD_OUT_OPERATIONS if split == "heldout" else OPERATIONS


def _draw(rng: np.random.Generator, task: str, tag: str, split: str) -> tuple[str, Scene, Scene | None] | None:
    """(text, target, source) if this draw belongs to the split."""
    if task == "edit":
        edit = sample_edit(rng, tag)
        return (edit.instruction, edit.target, edit.source) if split_of_edit(edit) == split else None
    scene = sample_scene(rng, tag)
    return (caption(scene, tag, rng), scene, None) if split_of(scene) == split else None


def samples(task: str, split: str, count: int, seed: int = 0) -> Iterator[Sample]:
    """The first `count` samples of a split: balanced over tags, no two alike, determined by the seed.

    A larger count begins with the smaller one's samples, and the picture's size plays no part.

    Raises:
      UserError: unknown task or split, or a count that the split cannot fill.
    """
    _check(task, SIZES[0], {split: count}, seed)
    tags = tags_of(task, split)
    rng = np.random.default_rng([seed, TASKS.index(task), SPLITS.index(split)])
    seen = set()
    for index in range(count):
        tag = tags[index % len(tags)]
        for _ in range(_TRIES):
            drawn = _draw(rng, task, tag, split)
            if drawn is None:
                continue
            text, target, source = drawn
            identity = (target.key, source.key if source else "", text)
            if identity not in seen:
                break
        else:
            raise UserError(f"counts[{split!r}] is {count}; there are no more than {index} different records")
        seen.add(identity)
        yield Sample(f"{task}_{split}_{index:06d}", tag, text, target, source)


def encode_png(picture: np.ndarray) -> bytes:
    """(h, w, 3) uint8 -> PNG bytes, quickly rather than small."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def encode(sample: Sample, size: int) -> dict[str, Any]:
    """The record of a sample: strings, JSON and PNG bytes, in the fields of the builder."""
    source = sample.source
    return {
        "id": sample.id,
        "task": "edit" if source else "generate",
        "tag": sample.tag,
        "text": sample.text,
        "target": encode_png(render(sample.target, size)),
        "source": encode_png(render(source, size)) if source else b"",
        "scene": sample.target.to_json(),
        "source_scene": source.to_json() if source else "",
    }


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _picture(png: bytes) -> np.ndarray | None:
    if not png:
        return None
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB"))


def decode(record: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `encode`, for a record as `open_split` gives it.

    Returns id, task ("generate" or "edit"), tag, text as str; target and source as (size, size, 3) uint8 and scene and
    source_scene as `Scene`, where source and source_scene are None for text-to-image.
    """
    texts = {name: _text(record[name]) for name in ("id", "task", "tag", "text")}
    source_scene = _text(record["source_scene"])
    return {
        **texts,
        "target": _picture(record["target"]),
        "source": _picture(record["source"]),
        "scene": Scene.from_json(_text(record["scene"])),
        "source_scene": Scene.from_json(source_scene) if source_scene else None,
    }


@dataclasses.dataclass(kw_only=True)
class SpritesConfig(tfds.core.BuilderConfig):
    """One task at one size (pixels)."""

    task: str = "t2i"
    size: int = 64


class Sprites(tfds.core.GeneratorBasedBuilder):
    """Builder `sprites`, configs t2i_64 … edit_256. `counts` (records per split) and `seed` decide what is written."""

    name = "sprites"
    VERSION = tfds.core.Version(_RELEASE)
    RELEASE_NOTES = {_RELEASE: "First release."}  # noqa: RUF012 (the name and form are the base class's)
    BUILDER_CONFIGS = [  # noqa: RUF012
        SpritesConfig(name=f"{task}_{size}", description=f"{task} at {size} px", task=task, size=size)
        for task in TASKS
        for size in SIZES
    ]

    def __init__(self, *, counts: Mapping[str, int] | None = None, seed: int = 0, **kwargs):
        self._counts, self._seed = _check(TASKS[0], SIZES[0], counts, seed), seed
        super().__init__(file_format=tfds.core.FileFormat.ARRAY_RECORD, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text, png = tfds.features.Text, lambda: tfds.features.Scalar(np.object_)
        names = ("id", "task", "tag", "text", "target", "source", "scene", "source_scene")
        features = {name: png() if name in ("target", "source") else text() for name in names}
        config = self.builder_config
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict(features),
            homepage="https://github.com/jdecked/twemoji",
            citation=_CITATION,
            license=_LICENSE,
            metadata=tfds.core.MetadataDict(_made_of(config.task, config.size, self._counts, self._seed)),
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        del dl_manager  # nothing to download: the drawings come with a package
        return {split: self._generate_examples(split, count) for split, count in self._counts.items()}

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[str, dict[str, Any]]]:
        for sample in samples(self.builder_config.task, split, count, self._seed):
            yield sample.id, encode(sample, self.builder_config.size)


def _made_of(task: str, size: int, counts: Mapping[str, int], seed: int) -> dict[str, Any]:
    return {"task": task, "size": size, "counts": dict(counts), "seed": seed}


def _directory(data_dir: str | os.PathLike, task: str, size: int) -> Path:
    return Path(data_dir).expanduser() / Sprites.name / f"{task}_{size}" / _RELEASE


def _finished(directory: Path) -> bool:
    """Whether every shard of every split is there. (The rename at the end is atomic, but folders get copied too.)"""
    if not (directory / "dataset_info.json").exists() or not (directory / "metadata.json").exists():
        return False
    info = tfds.builder_from_directory(directory).info
    return all(Path(path).exists() for split in SPLITS if split in info.splits for path in info.splits[split].filepaths)


def _refuse_other(directory: Path, wanted: dict[str, Any]) -> None:
    found = json.loads((directory / "metadata.json").read_text())
    if different := [
        f"{name} {found.get(name)} (asked: {wanted[name]})" for name in wanted if found.get(name) != wanted[name]
    ]:
        raise UserError(f"{directory} was made with {', '.join(different)}; use another data_dir or delete that folder")


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One writer at a time on this machine; the others wait and then find the result."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def prepare(
    data_dir: str | os.PathLike,
    task: str = "t2i",
    size: int = 64,
    counts: Mapping[str, int] | None = None,
    seed: int = 0,
) -> Path:
    """Writes the dataset unless it is there. Returns its folder, `data_dir`/sprites/TASK_SIZE/VERSION.

    `counts` replaces some of `DEFAULT_COUNTS` (records per split). The folder appears complete or not at all; one that
    lost files is made again.

    Raises:
      UserError: bad task, size, counts or seed, or a finished dataset there with other counts or another seed.
    """
    counts = _check(task, size, counts, seed)
    directory = _directory(data_dir, task, size)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _lock(directory.parent / ".lock"):
        if _finished(directory):
            _refuse_other(directory, _made_of(task, size, counts, seed))
            return directory
        for leftover in (directory, *directory.parent.glob(f"incomplete.*_{_RELEASE}")):
            shutil.rmtree(leftover, ignore_errors=True)
        builder = Sprites(
            data_dir=os.fspath(Path(data_dir).expanduser()), config=f"{task}_{size}", counts=counts, seed=seed
        )
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return directory


def open_split(data_dir: str | os.PathLike, task: str, size: int, split: str) -> Sequence[Mapping[str, Any]]:
    """A prepared split as a random-access source of encoded records (see `decode`), fit for `grain.MapDataset.source`.

    Raises UserError where the dataset has not been prepared or has no such split.
    """
    return _prepared(data_dir, task, size, split).as_data_source(split)


def split_files(data_dir: str | os.PathLike, task: str, size: int, split: str) -> list[Path]:
    """The shards of a prepared split; errors as of `open_split`."""
    return [Path(path) for path in _prepared(data_dir, task, size, split).info.splits[split].filepaths]


def _prepared(data_dir: str | os.PathLike, task: str, size: int, split: str) -> Any:
    _check(task, size, None, 0)
    if split not in SPLITS:
        raise UserError(f"split is {split!r}; one of {', '.join(SPLITS)} would be right")
    directory = _directory(data_dir, task, size)
    if not _finished(directory):
        raise UserError(f"data_dir has no finished dataset at {directory}; `prepare` writes it")
    return tfds.builder_from_directory(directory)
