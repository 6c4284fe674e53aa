"""What a folder of latents was made of, record by record, so that `precompute` keeps what did not change.

    latents-00000-0f1e2d3c4b5a.array_record    a shard; the end of its name is a digest of what it was made of
    made_from/latents-00000-0f1e2d3c4b5a.json  the id, the digest of the content and the bucket of each of its records
    checked/00000.json                         with several hosts: the state of the source that a shard was held to

Shards of other content have other names, so those of before stay until all of the new ones are there, and `info.json`,
which names the shards that count, changes from one whole set to the next at once.
"""

import dataclasses
import hashlib
import json
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np

from dreamlite_jax.data.records import BadRecord, Record
from dreamlite_jax.errors import UserError
from dreamlite_jax.json_files import read_json, write_json

MADE_FROM, CHECKED = "made_from", "checked"  # folders


def digest(*parts: Any) -> str:
    """32 hexadecimal digits of JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def content_digest(settings: str, record: Record) -> str:
    """32 hexadecimal digits of all that the latents and states of a record come from.

    Raises:
      BadRecord: a picture is neither bytes nor an array.
    """
    found = hashlib.sha256(f"{settings} {record.task} ".encode())
    pictures = [b"" if picture is None else _bytes(picture) for picture in (record.target, record.source, record.mask)]
    given = (record.source is not None, record.mask is not None)
    for part in (record.text.encode(), *pictures):
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    found.update(repr(given).encode())
    return found.hexdigest()[:32]


def _bytes(picture: Any) -> bytes:
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, np.ndarray):
        return f"{picture.shape} {picture.dtype} ".encode() + picture.tobytes()
    raise BadRecord(f"picture is a {type(picture).__name__}; it must be the bytes of a file, or an array")


class Entry(NamedTuple):
    """One record of a shard. `content` is its `content_digest`."""

    id: str
    content: str
    bucket: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a shard was made of.

    Attributes:
      settings: digest of all that goes into every record: config, autoencoder, text encoder.
      records: those in it, in order. refused: the contents whose words the text encoder did not take, and why.
      unreadable: contents whose pictures could not be decoded.
    """

    settings: str
    records: tuple[Entry, ...]
    refused: dict[str, str]
    unreadable: tuple[str, ...]

    def stem(self, index: int) -> str:
        """Name of the shard and of its manifest, without their endings."""
        return f"latents-{index:05d}-{digest(self.settings, [list(entry) for entry in self.records])[:12]}"


class Kept:
    """The shards of a folder whose content is known, of this run and of earlier ones.

    Attributes:
      refused, unreadable: see `Manifest`; of all of them.
    """

    def __init__(self, folder: Path, settings: str):
        self.folder, self.settings = folder, settings
        self.refused: dict[str, str] = {}
        self.unreadable: set[str] = set()
        self._manifests: dict[str, Manifest] = {}
        self._where: dict[str, tuple[str, int]] = {}
        self._readers: dict[str, Any] = {}
        self._lock = threading.Lock()
        self.reload()

    def reload(self) -> None:
        """Looks for shards that other hosts have made."""
        for path in sorted((self.folder / MADE_FROM).glob("latents-*.json")):
            if path.stem not in self._manifests and (manifest := self._read(path)) is not None:
                self._add(path.stem, manifest)

    def _read(self, path: Path) -> Manifest | None:
        shard = self.shard(path.stem)
        if not shard.is_file():
            return None
        try:
            value = read_json(path)
            records = tuple(Entry(str(i), str(c), int(b)) for i, c, b in value["records"])
            found = Manifest(value["settings"], records, dict(value["refused"]), tuple(value["unreadable"]))
            whole = found.stem(int(path.stem.split("-")[1])) == path.stem and _records_in(shard) == len(records)
        except Exception as error:  # of JSON and of the library, which raises nearly anything
            print(f"{path}: damaged ({type(error).__name__}); its records are made again", file=sys.stderr, flush=True)
            return None
        if not whole:
            print(f"{shard} is not what it was made as; its records are made again", file=sys.stderr, flush=True)
        return found if whole and found.settings == self.settings else None

    def _add(self, stem: str, manifest: Manifest) -> None:
        self._manifests[stem] = manifest
        self.refused |= manifest.refused
        self.unreadable |= set(manifest.unreadable)
        for position, entry in enumerate(manifest.records):
            self._where.setdefault(entry.content, (stem, position))

    def __contains__(self, content: str) -> bool:
        return content in self._where

    def shard(self, stem: str) -> Path:
        return self.folder / f"{stem}.array_record"

    def manifest(self, stem: str) -> Manifest | None:
        """Of a shard that is there and whole."""
        return self._manifests.get(stem)

    def has_shard(self, index: int) -> bool:
        """Whether there is any shard of this number."""
        return any(stem.startswith(f"latents-{index:05d}-") for stem in self._manifests)

    def record(self, entry: Entry) -> bytes | None:
        """The packed example that was made of this content, under the entry's id; None where it cannot be read."""
        from array_record.python import array_record_module

        stem, position = self._where[entry.content]
        try:
            with self._lock:
                if stem not in self._readers:
                    options = "readahead_buffer_size:0"
                    self._readers[stem] = array_record_module.ArrayRecordReader(str(self.shard(stem)), options=options)
                packed = self._readers[stem].read([position])[0]
            if self._manifests[stem].records[position].id == entry.id:
                return packed
            return msgpack.packb(msgpack.unpackb(packed) | {"id": entry.id})
        except Exception as error:  # of msgpack and of the library, which raise nearly anything
            where = f"{self.shard(stem)} record {position}"
            print(f"{where} cannot be read ({type(error).__name__}); it is made again", file=sys.stderr, flush=True)
            return None

    def put(self, index: int, manifest: Manifest, written: Path) -> str:
        """Takes a shard that was written under a temporary name. Returns its stem."""
        stem = manifest.stem(index)
        self._readers.pop(stem, None)
        written.replace(self.shard(stem))
        self.describe(stem, manifest)
        return stem

    def describe(self, stem: str, manifest: Manifest) -> None:
        """Writes down what a shard is made of, where that is not there yet."""
        if self._manifests.get(stem) != manifest or not (self.folder / MADE_FROM / f"{stem}.json").is_file():
            value = dataclasses.asdict(manifest) | {"records": [list(entry) for entry in manifest.records]}
            write_json(self.folder / MADE_FROM / f"{stem}.json", value)
            self._add(stem, manifest)

    def entries(self, stems: Iterable[str]) -> list[Entry]:
        """Records of those of these shards that are known."""
        return [entry for stem in stems if stem in self._manifests for entry in self._manifests[stem].records]

    def clear(self, stems: Sequence[str], tables: Sequence[str], alone: bool) -> None:
        """Removes shards and tables of before. `alone`: nobody else can be writing here; what kills left goes too."""
        self._readers.clear()
        keep = {*tables, *(f"{stem}.array_record" for stem in stems), *(f"{stem}.json" for stem in stems)}
        patterns = [("", "latents-*.array_record"), ("", "buckets*.npy"), (MADE_FROM, "latents-*.json")]
        if alone:
            patterns += [("", "*.tmp"), ("", ".*.tmp"), (MADE_FROM, ".*.tmp"), (CHECKED, "*.json"), (CHECKED, ".*.tmp")]
        for place, pattern in patterns:
            for path in (self.folder / place).glob(pattern):
                if path.name not in keep:
                    path.unlink(missing_ok=True)
        if alone and (self.folder / CHECKED).is_dir():
            (self.folder / CHECKED).rmdir()

    # --- with several hosts

    def check_off(self, index: int, stem: str, state: str) -> None:
        """Says for the other hosts that a shard is what the source has in this state."""
        path = self.folder / CHECKED / f"{index:05d}.json"
        value = {"shard": stem, "source": state}
        if not path.is_file() or _quietly(path) != value:
            write_json(path, value)

    def checked_off(self, index: int, state: str) -> str | None:
        """The shard that another host held to the source in this state, if it is there."""
        value = _quietly(self.folder / CHECKED / f"{index:05d}.json")
        stem = value.get("shard", "")
        return stem if value.get("source") == state and stem in self._manifests else None


def _quietly(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (UserError, OSError):
        return {}


def _records_in(shard: Path) -> int:
    from array_record.python import array_record_module

    reader = array_record_module.ArrayRecordReader(str(shard))
    try:
        return reader.num_records()
    finally:
        reader.close()
