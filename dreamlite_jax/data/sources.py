"""Raw sources: pictures and words from tensorflow-datasets, ArrayRecord shards, a folder with a jsonl, or the sprites.

    source = open_source(SourceConfig(path="photos", kind="folder"))
    source[0]                                # Record: still encoded; raises BadRecord when it cannot be used
    source.name(0)                           # where it stands, for a log

What is wrong with a whole source (no such folder, no such field) is a `UserError` when it is opened; what is wrong with
one record is a `BadRecord` when it is read, and the reader decides (`reading`). Nothing here imports TensorFlow.
"""

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dreamlite_jax.config import suggestion
from dreamlite_jax.errors import UserError
from dreamlite_jax.text.templates import Task
from dreamlite_jax.training.config import FieldsConfig, SourceConfig

EncodedPicture = bytes | np.ndarray  # of a file, or (H, W, 3 or 1) uint8
JSONL = "metadata.jsonl"


class BadRecord(Exception):
    """A record that cannot be used; the message says why, the caller where."""


@dataclasses.dataclass(frozen=True)
class Record:
    """What one record of a source says. `source` and `mask` are None where there is none."""

    id: str
    task: Task
    text: str
    target: EncodedPicture
    source: EncodedPicture | None = None
    mask: EncodedPicture | None = None


class Source(Protocol):
    """Random access to records.

    Attributes:
      files: that it reads from, as far as they tell whether it has changed.
      missing: shards that were left out. missing_share: how much of the source that is.
    """

    files: Sequence[Path]
    missing: Sequence[str]
    missing_share: float

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def name(self, index: int) -> str: ...


def open_source(config: SourceConfig) -> Source:
    """The source that a config describes.

    Raises:
      UserError: it is not there, is of another kind, is empty, or lacks a field.
    """
    kinds = {"sprites": Sprites, "tfds": TensorflowDataset, "array_record": ArrayRecords, "folder": Folder}
    if config.form not in kinds:
        raise UserError(
            f"source {config.path} has kind {config.form}; raw pictures come from one of {', '.join(kinds)}"
        )
    if not Path(config.path).is_dir():
        raise UserError(f"source {config.path}: no such folder")
    source = kinds[config.form](config)
    if not len(source):
        raise UserError(f"source {config.path} {config.name} has no records")
    return source


# --- fields of a record


def lookup(fields: Any, name: str) -> Any:
    """Field `name` ("captions.text" goes into a nested one; of a list the first entry counts), or None."""
    for part in name.split("."):
        fields = _first(fields)
        if not isinstance(fields, Mapping) or part not in fields:
            return None
        fields = fields[part]
    return _first(fields)


def _first(value: Any) -> Any:
    entries = isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim == 1)
    return (value[0] if len(value) else None) if entries else value


def kind_of(known: Mapping[str, bool], fields: FieldsConfig) -> Task:
    """Task of a record, from which of the config's fields it has.

    Raises:
      BadRecord: too few of them for either task.
    """
    if all(known[name] for name in ("source", "instruction", "target")):
        return "edit"
    if known["image"] and known["caption"]:
        return "generate"
    edit = known["source"] or known["instruction"] or known["target"]
    wanted = ("source", "instruction", "target") if edit else ("image", "caption")
    lacking = [getattr(fields, name) for name in wanted if not known[name]]
    raise BadRecord(
        f"no field {', '.join(map(repr, lacking))}; a record has {fields.image} and {fields.caption}, or "
        f"{fields.source}, {fields.instruction} and {fields.target}"
    )


def record_of(values: Mapping[str, Any], fields: FieldsConfig, default_id: str) -> Record:
    """The record that a mapping of fields stands for. Raises `BadRecord` when a field is missing or the text empty."""
    found = {field: lookup(values, name) for field, name in dataclasses.asdict(fields).items()}
    task = kind_of({name: value is not None for name, value in found.items()}, fields)
    editing = task == "edit"
    return Record(
        id=_text(found["id"]) or default_id,
        task=task,
        text=check_text(found["instruction" if editing else "caption"]),
        target=found["target" if editing else "image"],
        source=found["source"] if editing else None,
        mask=found["mask"] if editing else None,
    )


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise BadRecord(f"text {value[:40]!r} is not UTF-8") from None
    return "" if value is None else str(value)


def check_text(value: Any) -> str:
    """Words without white space around them; `BadRecord` when there are none."""
    if not isinstance(value, str | bytes):
        raise BadRecord(f"text is {value!r}, a {type(value).__name__}; it must be words")
    text = _text(value).strip()
    if not text:
        raise BadRecord("text is empty")
    return text


# --- kinds


class Sprites:
    """The embedded emoji scenes (`data.sprites`)."""

    files: Sequence[Path] = ()
    missing: Sequence[str] = ()
    missing_share = 0.0

    def __init__(self, config: SourceConfig):
        from dreamlite_jax.data.sprites import builder

        task, size = sprite_set(config.name)
        self.size = size
        self._records = builder.open_split(config.path, task, size, config.split)
        self._where = f"{config.name} {config.split}"

    def __len__(self) -> int:
        return len(self._records)

    def name(self, index: int) -> str:
        return f"{self._where}[{index}]"

    def __getitem__(self, index: int) -> Record:
        fields = self._records[index]
        return Record(
            id=_text(fields["id"]),
            task=_text(fields["task"]),
            text=check_text(fields["text"]),
            target=fields["target"],
            source=fields["source"] or None,
        )


def sprite_set(name: str) -> tuple[str, int]:
    """Task and size (pixels) in the name of a set of sprites."""
    task, _, size = name.partition("_")
    if not size.isdecimal():
        raise UserError(f"config.source.name is {name!r}; it must be a data set and a size, such as t2i_64")
    return task, int(size)


class ArrayRecords:
    """Shards of msgpack maps. Shards that names such as x-00002-of-00004 promise but that are missing are left out."""

    def __init__(self, config: SourceConfig):
        from array_record.python import array_record_module

        folder = Path(config.path)
        paths = sorted(folder.glob(f"{config.name}*.array_record"))
        if not paths:
            raise UserError(
                f"source {folder}: no file {config.name}*.array_record; that is what kind array_record reads"
            )
        self._fields = config.fields
        self.missing = _missing_shards([path.name for path in paths])
        total = len(paths) + len(self.missing)
        self._paths, counts = [], []
        for path in paths:
            try:
                reader = array_record_module.ArrayRecordReader(str(path))
                count = reader.num_records()
                reader.close()  # says what is wrong with a file that has been cut short
            except Exception as error:  # the library raises nothing narrower
                self.missing.append(f"{path.name} (cannot be opened: {_line(error)})")
            else:
                self._paths.append(path)
                counts.append(count)
        self.missing_share = len(self.missing) / total
        self.files = self._paths
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._readers: dict[int, Any] = {}

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _place(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - (int(self._ends[shard - 1]) if shard else 0)

    def name(self, index: int) -> str:
        shard, position = self._place(index)
        return f"{self._paths[shard].name}[{position}]"

    def __getitem__(self, index: int) -> Record:
        import msgpack
        from array_record.python import array_record_module

        shard, position = self._place(index)
        if shard not in self._readers:  # two threads may both open one: the readers are safe to share, and to drop
            options = "readahead_buffer_size:0"
            self._readers[shard] = array_record_module.ArrayRecordReader(str(self._paths[shard]), options=options)
        try:
            values = msgpack.unpackb(self._readers[shard].read([position])[0])
        except Exception as error:  # of msgpack and of the library, which raise nearly anything
            raise BadRecord(f"cannot be read ({_line(error)}); the record or its shard is damaged") from None
        if not isinstance(values, dict):
            raise BadRecord(f"is a {type(values).__name__}; it must be a msgpack map of fields")
        return record_of(values, self._fields, self.name(index))


def _missing_shards(names: Sequence[str]) -> list[str]:
    """Shards that the names of the others promise: x-00000-of-00002 without x-00001-of-00002."""
    found, promised = set(names), {}
    for name in names:
        if match := re.fullmatch(r"(.*)-(\d+)-of-(\d+)(\..*)", name):
            stem, digits, count, end = match[1], match[2], match[3], match[4]
            for i in range(int(count)):
                promised[f"{stem}-{i:0{len(digits)}d}-of-{count}{end}"] = None
    return [name for name in promised if name not in found]


def _line(error: BaseException) -> str:
    """An error on one line, not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


class TensorflowDataset:
    """A split of a prepared data set, through `as_data_source`. Pictures stay encoded; missing shards are left out."""

    def __init__(self, config: SourceConfig):
        import tensorflow_datasets as tfds

        directory = tfds_directory(Path(config.path), config.name)
        builder = tfds.builder_from_directory(directory)
        info = builder.info
        if info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
            raise UserError(
                f"source {directory} is stored as {info.file_format.value}; prepare it with "
                'download_and_prepare(file_format="array_record"), which can be read at random'
            )
        try:
            files = info.splits[config.split].file_instructions
        except (KeyError, ValueError):
            raise UserError(
                f"source {directory} has no split {config.split!r}; its splits are {', '.join(info.splits)}"
            ) from None
        self._check_fields(directory, info.features, config.fields)
        self._fields, self._where = config.fields, f"{config.name} {config.split}"
        self._records = builder.as_data_source(config.split, decoders=_encoded_pictures(info.features))
        kept, start, self.missing, self.files = [], 0, [], []
        for file in files:
            if os.path.isfile(file.filename):
                kept.append(np.arange(start, start + file.take))
                self.files.append(Path(file.filename))
            else:
                self.missing.append(os.path.basename(file.filename))
            start += file.take
        self._kept = np.concatenate(kept) if kept else np.arange(0)
        self.missing_share = 1.0 - len(self._kept) / max(1, start)

    @staticmethod
    def _check_fields(directory: Path, features: Any, fields: FieldsConfig) -> None:
        known = {}
        for field, name in dataclasses.asdict(fields).items():
            node = features
            for part in name.split("."):
                node = getattr(node, "feature", node)  # of a sequence
                node = node[part] if hasattr(node, "keys") and part in node else None
            known[field] = node is not None
        try:
            kind_of(known, fields)
        except BadRecord as error:
            raise UserError(f"source {directory}: {error}; its fields are {', '.join(features)}") from None

    def __len__(self) -> int:
        return len(self._kept)

    def name(self, index: int) -> str:
        return f"{self._where}[{self._kept[index]}]"

    def __getitem__(self, index: int) -> Record:
        try:
            values = self._records[int(self._kept[index])]
        except Exception as error:  # of protobuf, numpy and the library, which raise nearly anything
            raise BadRecord(f"cannot be read ({_line(error)}); the record or its shard is damaged") from None
        return record_of(values, self._fields, self.name(index))


def tfds_directory(data_dir: Path, name: str) -> Path:
    """Folder of data set NAME, NAME/CONFIG, NAME:VERSION or NAME/CONFIG:VERSION in `data_dir`; the newest version."""
    if not name:
        raise UserError(f"source {data_dir} has no name; kind tfds needs one, such as coco_captions:1.1.0")
    name, _, version = name.partition(":")
    folder = data_dir / name
    versions = [path.parent for path in folder.glob("*/dataset_info.json")]
    if version:
        versions = [path for path in versions if path.name == version]
    if not versions:
        there = sorted(str(p.parent.relative_to(data_dir)) for p in data_dir.glob("**/dataset_info.json"))
        asked = f"{name}:{version}" if version else name
        raise UserError(f"source {data_dir} has no prepared data set {asked!r}{suggestion(asked, there)}")
    return max(versions, key=lambda path: [int(x) if x.isdecimal() else -1 for x in path.name.split(".")])


def _encoded_pictures(features: Any) -> dict[str, Any]:
    """Decoders that leave pictures as the bytes of their files, so that all kinds are decoded alike (`transforms`)."""
    import tensorflow_datasets as tfds

    decoders: dict[str, Any] = {}
    for name, feature in features.items():
        if isinstance(feature, tfds.features.Image):
            decoders[name] = tfds.decode.SkipDecoding()
        elif isinstance(feature, tfds.features.FeaturesDict) and (inner := _encoded_pictures(feature)):
            decoders[name] = inner
    return decoders


class Folder:
    """Pictures in a folder, one JSON object a line: {"image", "caption"} or {"source", "instruction", "target"}."""

    missing: Sequence[str] = ()
    missing_share = 0.0

    def __init__(self, config: SourceConfig):
        self._folder, self._fields = Path(config.path), config.fields
        self._path = self._folder / (config.name or JSONL)
        if not self._path.is_file():
            raise UserError(f"source {self._path}: no such file; kind folder needs one JSON object a line in it")
        self.files = (self._path,)
        starts, self._lines, start = [], [], 0
        with open(self._path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    self._check(number, line)
                    starts.append((start, start + len(line)))
                    self._lines.append(number)
                start += len(line)
        self._spans = np.asarray(starts, np.int64).reshape(-1, 2)
        self._file = os.open(self._path, os.O_RDONLY)

    def _check(self, number: int, line: bytes) -> None:
        """Every line has the fields of one task: another schema is no accident of one record."""
        where = f"source {self._path} line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{where} is a {type(row).__name__}; it must be an object with fields")
        known = {
            f.name: lookup(row, getattr(self._fields, f.name)) is not None for f in dataclasses.fields(FieldsConfig)
        }
        try:
            kind_of(known, self._fields)
        except BadRecord as error:
            raise UserError(f"{where}: {error}") from None

    def __del__(self):
        if hasattr(self, "_file"):
            os.close(self._file)

    def __len__(self) -> int:
        return len(self._spans)

    def name(self, index: int) -> str:
        return f"{self._path.name} line {self._lines[index]}"

    def __getitem__(self, index: int) -> Record:
        start, end = map(int, self._spans[index])
        record = record_of(json.loads(os.pread(self._file, end - start, start)), self._fields, "")
        pictures = {name: self._read(getattr(record, name)) for name in ("target", "source", "mask")}
        return dataclasses.replace(record, id=record.id or str(record.target), **pictures)

    def _read(self, name: Any) -> bytes | None:
        if name is None:
            return None
        if not isinstance(name, str):
            raise BadRecord(f"picture is {name!r}; it must be the path of a file")
        try:
            return (self._folder / name).read_bytes()
        except OSError as error:
            raise BadRecord(f"picture {name}: {error.strerror or error}") from None
