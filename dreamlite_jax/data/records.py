"""What a record of a raw source is, and how one is found in a mapping of fields, whatever these are called.

Words are held here to what an encoder and a file of latents can take, so that one record with a broken caption is a
`BadRecord` wherever it is read.
"""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dreamlite_jax.data.config import FieldsConfig
from dreamlite_jax.errors import UserError
from dreamlite_jax.text import templates
from dreamlite_jax.text.templates import Task

EncodedPicture = bytes | np.ndarray  # of a file, or (H, W, 3 or 1) uint8
ALIASES = {"image": "file_name", "caption": "text"}  # what the `datasets` library calls them in a folder
SHOWN = 12  # names listed in one message


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


class Stamp(NamedTuple):
    """What tells, without reading it, whether a file is still the one that it was."""

    name: str
    size: int  # bytes
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: Path, name: str = "") -> "Stamp":
        stat = path.stat()
        return cls(name or path.name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def short_line(error: BaseException) -> str:
    """An error on one line, not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def named_fields(fields: FieldsConfig, there: Collection[str]) -> FieldsConfig:
    """The fields by the names that records have: those of the `datasets` library stand in for a default name that is in
    no record. `there` are the names in any of them."""
    default, found = FieldsConfig(), {}
    for field, alias in ALIASES.items():
        name = getattr(fields, field)
        if name == getattr(default, field) and name not in there and alias in there:
            found[field] = alias
    return dataclasses.replace(fields, **found)


def mapping_hint(there: Collection[str]) -> str:
    """The end of a message about fields that are missing: what was found, and the setting that names them."""
    names = sorted(there)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (
        f"its fields are {', '.join(map(repr, names[:SHOWN])) or 'none'}{more}; say which is which, for example by "
        "--config.source.fields.caption=NAME (in training --config.data.sources.0.fields.caption=NAME)"
    )


def lookup(fields: Any, name: str) -> Any:
    """Field `name` ("captions.text" goes into a nested one; of a list the first entry counts), or None."""
    found, value = _walk(fields, name)
    return _first(value) if found else None


def has_field(fields: Any, name: str) -> bool:
    """Whether there is such a field, be it null."""
    return _walk(fields, name)[0]


def _walk(fields: Any, name: str) -> tuple[bool, Any]:
    for part in name.split("."):
        fields = _first(fields)
        if not isinstance(fields, Mapping) or part not in fields:
            return False, None
        fields = fields[part]
    return True, fields


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


def check_fields(values: Any, fields: FieldsConfig) -> None:
    """Raises `BadRecord` unless a mapping has the fields of a task, whatever is in them."""
    kind_of({field: has_field(values, name) for field, name in dataclasses.asdict(fields).items()}, fields)


def record_of(values: Mapping[str, Any], fields: FieldsConfig, default_id: str) -> Record:
    """The record that a mapping of fields stands for.

    Raises:
      BadRecord: a field is missing or null, or the words cannot be used (`check_text`).
    """
    names = dataclasses.asdict(fields)
    found = {field: lookup(values, name) for field, name in names.items()}
    try:
        task = kind_of({name: value is not None for name, value in found.items()}, fields)
    except BadRecord:
        check_fields(values, fields)  # which says it where a field is missing
        null = [
            repr(name)
            for field, name in names.items()
            if found[field] is None and field not in ("mask", "id") and has_field(values, name)
        ]
        raise BadRecord(f"field {', '.join(null)} is null or empty") from None
    editing = task == "edit"
    return Record(
        id=_identifier(found["id"]) or default_id,
        task=task,
        text=check_text(found["instruction" if editing else "caption"], task),
        target=found["target" if editing else "image"],
        source=found["source"] if editing else None,
        mask=found["mask"] if editing else None,
    )


def _identifier(value: Any) -> str:
    return "" if value is None else decoded("id", value if isinstance(value, bytes) else str(value))


def decoded(what: str, value: bytes | str) -> str:
    """A string of whole characters, which every file and encoder here can take. Raises `BadRecord` for another."""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise BadRecord(f"{what} {value[:40]!r} is not UTF-8") from None
    try:
        value.encode()
    except UnicodeEncodeError as error:
        around = value[max(0, error.start - 20) : error.end + 20]
        raise BadRecord(f"{what} has half of a surrogate pair at character {error.start + 1}: {around!r}") from None
    if "\0" in value:
        place = value.index("\0")
        around = value[max(0, place - 20) : place + 21]
        raise BadRecord(f"{what} has a NUL at character {place + 1}: {around!r}")
    return value


def check_text(value: Any, task: Task) -> str:
    """Words without white space around them; `BadRecord` where there are none or no encoder takes them."""
    if not isinstance(value, str | bytes):
        raise BadRecord(f"text is {value!r:.80}, a {type(value).__name__}; it must be words")
    text = decoded("text", value).strip()
    if not text:
        raise BadRecord("text is empty")
    try:
        return templates.clean_prompt(task, text)
    except UserError as error:
        raise BadRecord(str(error)) from None
