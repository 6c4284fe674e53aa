"""Pictures in a folder and a jsonl that describes them."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dreamlite_jax.data.config import SourceConfig
from dreamlite_jax.data.records import (
    BadRecord,
    Record,
    Stamp,
    check_fields,
    decoded,
    lookup,
    mapping_hint,
    named_fields,
    record_of,
    short_line,
)
from dreamlite_jax.errors import UserError

JSONL = "metadata.jsonl"


class Folder:
    """Pictures in a folder, one JSON object a line: {"image", "caption"} or {"source", "instruction", "target"}.

    Where no line has "image" or "caption", "file_name" and "text" are taken, as the `datasets` library calls them.
    """

    missing: Sequence[str] = ()
    missing_share = 0.0

    def __init__(self, config: SourceConfig):
        self._folder = Path(config.path)
        self._path = self._folder / (config.name or JSONL)
        if not self._path.is_file():
            raise UserError(f"source {self._path}: no such file; kind folder needs one JSON object a line in it")
        self.files = (self._path,)
        spans, self._lines, start = [], [], 0
        there: dict[str, None] = {}  # names of fields, in the order in which they were found
        with open(self._path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    spans.append((start, start + len(line)))
                    self._lines.append(number)
                    with contextlib.suppress(BadRecord):  # it is named when it is read
                        there |= dict.fromkeys(_row(line))
                start += len(line)
        self._spans = np.asarray(spans, np.int64).reshape(-1, 2)
        self._file = os.open(self._path, os.O_RDONLY)
        self._fields = named_fields(config.fields, there)
        self._check(there)

    def _check(self, there: Collection[str]) -> None:
        """Raises `UserError` where no line has the fields of a task: that is another schema, and no accident."""
        why = None
        for index in range(len(self)):
            try:
                check_fields(self._row(index), self._fields)
            except BadRecord as error:
                why = why or (index, str(error))
            else:
                return
        if why:
            raise UserError(f"source {self._path} line {self._lines[why[0]]}: {why[1]}; {mapping_hint(there)}")

    def __del__(self):
        if hasattr(self, "_file"):
            os.close(self._file)

    def __len__(self) -> int:
        return len(self._spans)

    def name(self, index: int) -> str:
        return f"{self._path.name} line {self._lines[index]}"

    def __getitem__(self, index: int) -> Record:
        record = record_of(self._row(index), self._fields, "")
        pictures = {name: self._read(getattr(record, name)) for name in ("target", "source", "mask")}
        default = record.target if isinstance(record.target, str) else ""
        return dataclasses.replace(record, id=record.id or decoded("picture", default), **pictures)

    def stamps(self, index: int) -> Sequence[Stamp]:
        row, found = self._row(index), []
        editing = lookup(row, self._fields.target) is not None and lookup(row, self._fields.source) is not None
        for field in ("target", "source", "mask") if editing else ("image",):
            name = lookup(row, getattr(self._fields, field))
            if isinstance(name, str):
                try:
                    found.append(Stamp.of(self._folder / name, name))
                except (OSError, ValueError) as error:
                    raise BadRecord(f"picture {name!r}: {getattr(error, 'strerror', None) or error}") from None
        return found

    def _row(self, index: int) -> dict[str, Any]:
        start, end = map(int, self._spans[index])
        return _row(os.pread(self._file, end - start, start))

    def _read(self, name: Any) -> bytes | None:
        if name is None:
            return None
        if not isinstance(name, str):
            raise BadRecord(f"picture is {name!r:.80}; it must be the path of a file")
        try:
            return (self._folder / name).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            raise BadRecord(f"picture {name}: {getattr(error, 'strerror', None) or error}") from None


def _row(line: bytes) -> dict[str, Any]:
    """The object in a line of a jsonl."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"is not JSON: {short_line(error)}") from None
    if not isinstance(row, dict):
        raise BadRecord(f"is a {type(row).__name__}; it must be an object with fields")
    return row
