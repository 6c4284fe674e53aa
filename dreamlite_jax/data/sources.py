"""Raw sources: pictures and words from tensorflow-datasets, ArrayRecord shards, a folder with a jsonl, or the sprites.

    source = open_source(SourceConfig(path="photos", kind="folder"))
    source[0]                                # Record: still encoded; raises BadRecord when it cannot be used
    source.name(0)                           # where it stands, for a log

What is wrong with a whole source (no such folder, no such field) is a `UserError` when it is opened; what is wrong with
one record is a `BadRecord` when it is read, and the reader decides (`reading`). Nothing here imports TensorFlow.
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dreamlite_jax.config import suggestion
from dreamlite_jax.data.config import FieldsConfig, SourceConfig
from dreamlite_jax.data.folder import Folder
from dreamlite_jax.data.records import (
    BadRecord,
    Record,
    Stamp,
    check_fields,
    check_text,
    decoded,
    kind_of,
    mapping_hint,
    named_fields,
    record_of,
    short_line,
)
from dreamlite_jax.errors import UserError

LOOKED_AT = 100  # records at the beginning of shards that are asked for their fields


class Source(Protocol):
    """Random access to records.

    Attributes:
      files: that say what the records are.
      missing: shards that were left out. missing_share: how much of the source that is.
    """

    files: Sequence[Path]
    missing: Sequence[str]
    missing_share: float

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def name(self, index: int) -> str: ...

    def stamps(self, index: int) -> Sequence[Stamp]:
        """Of the record's own files beyond `files`: its target's first. Raises `BadRecord` where one is missing."""


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


# --- kinds


class _Shards:
    """A source whose records are in its files."""

    def stamps(self, index: int) -> Sequence[Stamp]:
        return ()


class Sprites(_Shards):
    """The embedded emoji scenes (`data.sprites`)."""

    missing: Sequence[str] = ()
    missing_share = 0.0

    def __init__(self, config: SourceConfig):
        from dreamlite_jax.data.sprites import builder

        task, size = sprite_set(config.name)
        self.size = size
        self._records = builder.open_split(config.path, task, size, config.split)
        self.files = builder.split_files(config.path, task, size, config.split)
        self._where = f"{config.name} {config.split}"

    def __len__(self) -> int:
        return len(self._records)

    def name(self, index: int) -> str:
        return f"{self._where}[{index}]"

    def __getitem__(self, index: int) -> Record:
        fields = self._records[index]
        return Record(
            id=decoded("id", fields["id"]),
            task=decoded("task", fields["task"]),
            text=check_text(fields["text"], "generate"),
            target=fields["target"],
            source=fields["source"] or None,
        )


def sprite_set(name: str) -> tuple[str, int]:
    """Task and size (pixels) in the name of a set of sprites."""
    task, _, size = name.partition("_")
    if not size.isdecimal():
        raise UserError(f"config.source.name is {name!r}; it must be a data set and a size, such as t2i_64")
    return task, int(size)


class ArrayRecords(_Shards):
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
                self.missing.append(f"{path.name} (cannot be opened: {short_line(error)})")
            else:
                self._paths.append(path)
                counts.append(count)
        self.missing_share = len(self.missing) / total
        self.files = self._paths
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._readers: dict[int, Any] = {}
        self._find_fields(folder, config.name)

    def _find_fields(self, folder: Path, name: str) -> None:
        """Settles what fields are called, by the first records. Raises `UserError` where none of them has a task's."""
        found: list[dict[str, Any]] = []
        for index in range(min(LOOKED_AT, len(self))):
            with contextlib.suppress(BadRecord):  # of one that is damaged
                found.append(self._values(index))
        there = {str(key) for values in found for key in values}
        self._fields = named_fields(self._fields, there)
        refused = _refusal(found, self._fields)
        if refused:
            raise UserError(f"source {folder} {name}: {refused}; {mapping_hint(there)}")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _place(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - (int(self._ends[shard - 1]) if shard else 0)

    def name(self, index: int) -> str:
        shard, position = self._place(index)
        return f"{self._paths[shard].name}[{position}]"

    def __getitem__(self, index: int) -> Record:
        return record_of(self._values(index), self._fields, self.name(index))

    def _values(self, index: int) -> dict[str, Any]:
        import msgpack
        from array_record.python import array_record_module

        shard, position = self._place(index)
        if shard not in self._readers:  # two threads may both open one: the readers are safe to share, and to drop
            options = "readahead_buffer_size:0"
            self._readers[shard] = array_record_module.ArrayRecordReader(str(self._paths[shard]), options=options)
        try:
            values = msgpack.unpackb(self._readers[shard].read([position])[0])
        except Exception as error:  # of msgpack and of the library, which raise nearly anything
            raise BadRecord(f"cannot be read ({short_line(error)}); the record or its shard is damaged") from None
        if not isinstance(values, dict):
            raise BadRecord(f"is a {type(values).__name__}; it must be a msgpack map of fields")
        return values


def _refusal(rows: Sequence[Any], fields: FieldsConfig) -> str:
    """Why no row has the fields of a task; empty where one has, or where there is no row to tell by."""
    why = ""
    for row in rows:
        try:
            check_fields(row, fields)
        except BadRecord as error:
            why = why or str(error)
        else:
            return ""
    return why


def _missing_shards(names: Sequence[str]) -> list[str]:
    """Shards that the names of the others promise: x-00000-of-00002 without x-00001-of-00002."""
    found, promised = set(names), {}
    for name in names:
        if match := re.fullmatch(r"(.*)-(\d+)-of-(\d+)(\..*)", name):
            stem, digits, count, end = match[1], match[2], match[3], match[4]
            for i in range(int(count)):
                promised[f"{stem}-{i:0{len(digits)}d}-of-{count}{end}"] = None
    return [name for name in promised if name not in found]


class TensorflowDataset(_Shards):
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
        self._fields = named_fields(config.fields, set(info.features))
        self._check_fields(directory, info.features, self._fields)
        self._where = f"{config.name} {config.split}"
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
            raise UserError(f"source {directory}: {error}; {mapping_hint(set(features))}") from None

    def __len__(self) -> int:
        return len(self._kept)

    def name(self, index: int) -> str:
        return f"{self._where}[{self._kept[index]}]"

    def __getitem__(self, index: int) -> Record:
        try:
            values = self._records[int(self._kept[index])]
        except Exception as error:  # of protobuf, numpy and the library, which raise nearly anything
            raise BadRecord(f"cannot be read ({short_line(error)}); the record or its shard is damaged") from None
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
