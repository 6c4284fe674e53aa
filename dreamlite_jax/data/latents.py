"""Precomputed examples: latents and text states in ArrayRecord shards, written by `precompute`, read by training.

A folder holds shards `latents-*.array_record` and `info.json`, which names them and is written last: without it the
folder is incomplete. Where its pictures have several sizes, `info.json` lists them, and names a table of the size that
each record has. What `precompute` needs to know besides, to keep what did not change, is in `kept`.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import msgpack
import numpy as np

from dreamlite_jax.data import place, reading
from dreamlite_jax.data.buckets import Size
from dreamlite_jax.data.config import SourceConfig
from dreamlite_jax.data.reading import BadRecords
from dreamlite_jax.data.records import BadRecord
from dreamlite_jax.errors import UserError
from dreamlite_jax.json_files import read_json

FORMAT = 1
INFO = "info.json"
BUCKETS = "buckets.npy"  # the bucket of each record, where a folder has several and its info names no other table
LARGEST = float(np.finfo(np.float16).max)  # that a stored number can be


@dataclasses.dataclass(frozen=True)
class Example:
    """One training example.

    Attributes:
      target: (h, w, c) latents. source: the same of an edit's source, else None.
      changed: (h, w) share of each latent pixel's area that the edit changes, else None.
      states: (s, d) text states without padding. size: (width, height) of the target in pixels.
      null_tail: (t, d) last states of the null prompt, else None; they follow the first `null_from` of `states`
        (`text.encoder.PromptEncoder.null_tail`).
    """

    id: str
    task: str
    text: str
    target: np.ndarray
    source: np.ndarray | None
    changed: np.ndarray | None
    states: np.ndarray
    size: tuple[int, int]
    null_tail: np.ndarray | None = None
    null_from: int = -1


ARRAYS = ("target", "source", "changed", "states", "null_tail")


def check_range(example: Example, where: str, remedy: str) -> None:
    """Raises `UserError` where an array holds what is no number, or none that float16 has."""
    for name in ARRAYS:
        array = getattr(example, name)
        if array is None or np.abs(array).max(initial=0.0) <= LARGEST:  # False for NaN too
            continue
        what = {"target": "latents of the target", "source": "latents of the source"}.get(name, name)
        numbers = array[np.isfinite(array)]
        largest = f"{np.abs(numbers).max():g}" if len(numbers) else "none"
        nans, infinite = int(np.isnan(array).sum()), int(np.isinf(array).sum())
        raise UserError(
            f"{where}: {what} hold {nans} NaN and {infinite} infinite values, the largest finite one is {largest}; "
            f"float16, in which they are kept, ends at {LARGEST:g}: {remedy}"
        )


def pack(example: Example) -> bytes:
    """Record of an example; arrays as float16 with their shapes. Raises `UserError` where they do not fit in."""
    check_range(example, f"record {example.id}", "the encoder that they come from is broken or of another scale")
    fields = dataclasses.asdict(example)
    for name in ARRAYS:
        array = fields[name]
        fields[name] = None if array is None else [list(array.shape), np.asarray(array, np.float16).tobytes()]
    return msgpack.packb(fields)


def unpack(record: bytes) -> Example:
    """The example of a record, arrays in float32. Fields with a default may be missing: older records lack them."""
    fields = msgpack.unpackb(record)
    for name in ARRAYS:
        if fields.get(name) is not None:
            shape, data = fields[name]
            fields[name] = np.frombuffer(data, np.float16).reshape(shape).astype(np.float32)
    fields["size"] = tuple(fields["size"])
    return Example(**fields)


def shard_path(directory: Path, index: int, count: int) -> Path:
    return directory / f"latents-{index:05d}-of-{count:05d}.array_record"


def write_shard(path: Path, examples: Iterator[Example]) -> None:
    """Writes one shard under a temporary name and renames it when whole."""
    os.replace(write_records(path, map(pack, examples)), path)


def write_records(path: Path, records: Iterator[bytes]) -> Path:
    """Writes packed examples beside `path`. Returns the temporary file, which is whole."""
    from array_record.python import array_record_module

    for stale in path.parent.glob(f"{path.stem}.*.tmp"):  # of an attempt that was killed; nobody else writes this shard
        stale.unlink()
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
    try:
        for record in records:
            writer.write(record)
    except BaseException:
        writer.close()
        temporary.unlink(missing_ok=True)
        raise
    writer.close()
    return temporary


def write_info(directory: Path, info: dict[str, Any], null_states: np.ndarray) -> None:
    """Marks a folder complete. `null_states` (s, d) is the empty prompt, for dropped text."""
    info = {"format": FORMAT, **info, "null_states": np.asarray(null_states, np.float32).tolist()}
    temporary = directory / f"{INFO}.{uuid.uuid4().hex}.tmp"  # several hosts may get here at the same moment
    temporary.write_text(json.dumps(info))
    os.replace(temporary, directory / INFO)


def read_info(directory: str | os.PathLike) -> dict[str, Any]:
    """Facts of a complete folder.

    Raises:
      UserError: not such a folder, or an incomplete one.
    """
    path = Path(directory) / INFO
    if not path.is_file():
        raise UserError(
            f"{directory} holds no complete set of latents (no info.json); "
            "make one with python -m dreamlite_jax.precompute"
        )
    info = read_json(path)
    if info.get("format") != FORMAT:
        raise UserError(f"{path} has format {info.get('format')}; this version reads {FORMAT}: precompute again")
    missing = [p.name for p in shards(directory, info) if not p.is_file()]
    if missing:
        raise UserError(f"{directory} lacks shard {missing[0]} ({len(missing)} missing); precompute again")
    return info


def shards(directory: str | os.PathLike, info: dict[str, Any]) -> list[Path]:
    """The shards that count; folders of older versions do not name them."""
    if "files" in info:
        return [Path(directory) / name for name in info["files"]]
    return [shard_path(Path(directory), i, info["shards"]) for i in range(info["shards"])]


def folder_digest(directory: str | os.PathLike) -> str:
    """What tells a complete folder from another, without reading all of it; the same for a copy of it elsewhere.

    Of a folder that says what it was made of, that, so the content of every record; of older ones what they say of
    themselves, how many records they have, and the first and the last of them.
    """
    info = read_info(directory)
    if "digest" in info:
        return info["digest"]
    records = open_examples(directory)
    found = hashlib.sha256(json.dumps([info, len(records)], sort_keys=True).encode())
    for index in (0, len(records) - 1) if len(records) else ():
        found.update(records[index])
    return found.hexdigest()[:32]


def open_examples(directory: str | os.PathLike) -> Sequence[bytes]:
    """Random-access records of a complete folder."""
    info = read_info(directory)
    return grain.sources.ArrayRecordDataSource([str(path) for path in shards(directory, info)])


def collate(example: Example, text_length: int, null_tail: int = 0) -> dict[str, np.ndarray]:
    """Fixed shapes of one example: target, source (zeros when generating), weight, text, mask, editing, size.

    With `null_tail`, the number of own states of null prompts, null_tail and null_from too (`NullTails`).

    `weight` is the edit loss of the spec's section 6, stage 2: log2(x) + 1 where the edit changes the picture, x being
    the ratio of the whole area to the changed one, and 1 elsewhere.
    """
    tokens, width = example.states.shape
    if tokens > text_length:
        raise UserError(
            f"record {example.id} has {tokens} text tokens; data.text_length {text_length} is too small for it"
        )
    text = np.zeros((text_length, width), np.float32)
    text[:tokens] = example.states
    changed = np.zeros(example.target.shape[:2]) if example.changed is None else example.changed
    weight = region_weight(changed)
    null = {}
    if null_tail:
        own = example.null_tail is not None
        states = example.null_tail if own else np.zeros((null_tail, width), np.float32)
        null = {"null_tail": states, "null_from": np.float32(example.null_from if own else -1)}
    return {
        "target": example.target,
        "source": np.zeros_like(example.target) if example.source is None else example.source,
        "weight": weight[..., None],
        "text": text,
        "mask": (np.arange(text_length) < tokens).astype(np.float32),
        "editing": np.float32(example.source is not None),
        "size": np.asarray(example.size, np.float32),
        **null,
    }


def pool(mask: np.ndarray, factor: int) -> np.ndarray:
    """(H, W) booleans to the share of true ones in each factor x factor cell."""
    h, w = mask.shape
    return mask.reshape(h // factor, factor, w // factor, factor).mean((1, 3), dtype=np.float32)


def region_weight(changed: np.ndarray) -> np.ndarray:
    """(h, w) weight of the edit loss where this share of each latent pixel's area changes; see `collate`."""
    weight = np.ones(changed.shape, np.float32)
    if changed.any():
        weight += (changed > 0) * np.log2(changed.size / changed.sum()).astype(np.float32)
    return weight


Extend = Callable[[str], dict[str, np.ndarray]]


def no_fields(text: str) -> dict[str, np.ndarray]:
    """The `extend` of a reader that needs none."""
    return {}


def first_examples(source: SourceConfig, count: int) -> list[Example]:
    """The first examples of a folder that have one size and task, for a picture of them."""
    records, found = open_examples(source.path), []
    for i in range(min(reading.LOOKED_AT, len(records))):
        try:
            example = unpack(records[i])
        except Exception:  # a damaged record; training names it
            continue
        _check_read(example, source.path, i)
        if not found or (example.size, example.task) == (found[0].size, found[0].task):
            found.append(example)
        if len(found) == count:
            break
    if not found:
        raise UserError(f"none of the first records of {source.path} can be read; precompute again")
    return found


def _check_read(example: Example, folder: str, index: int) -> None:
    """Raises `UserError` where a folder of an older version holds what is no number."""
    remedy = "an older version kept them; repair the encoder that they come from and precompute into another folder"
    check_range(example, f"{folder} record {index} ({example.id})", remedy)


class LatentReader:
    """Examples of latent folders as rows of a batch (`reading.Reader`).

    Args:
      extend: more fields of a row, by the example's text; their shapes do not depend on it.

    Attributes:
      sizes: (width, height) in pixels of the buckets of all folders together, and the bucket of each record.
    """

    def __init__(self, configs: Sequence[SourceConfig], text_length: int, extend: Extend = no_fields):
        self.configs, self.text_length, self.extend = tuple(configs), text_length, extend
        self.infos = [read_info(config.path) for config in configs]
        self.null_tail = max(info.get("null_tail", 0) for info in self.infos)
        self._open()
        self.lengths = tuple(len(records) for records in self._records)
        own = [self._own_sizes(i) for i in range(len(self.configs))]
        self.sizes: list[Size] = sorted(set(itertools.chain(*own)))
        self.bucket_of = [self._buckets(i, sizes) for i, sizes in enumerate(own)]

    def _open(self) -> None:
        self._records = [open_examples(config.path) for config in self.configs]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_records"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _own_sizes(self, source: int) -> list[Size]:
        """Sizes in one folder; one that lists none has that of its first readable record alone."""
        if sizes := self.infos[source].get("buckets"):
            return [tuple(size) for size in sizes]
        return [self._example(source, reading.read(_Sizes(self), source, 0, 0).index).size]

    def _buckets(self, source: int, sizes: Sequence[Size]) -> np.ndarray | None:
        numbers = np.asarray([self.sizes.index(size) for size in sizes], np.int32)
        if len(sizes) > 1:
            name = self.infos[source].get("bucket_table", BUCKETS)
            table = np.load(Path(self.configs[source].path) / name)
            if len(table) != self.lengths[source]:
                raise UserError(f"{self.configs[source].path}/{name} is not of these shards; precompute again")
            return numbers[table]
        return None if numbers[0] == 0 else np.full(self.lengths[source], numbers[0], np.int32)

    def _example(self, source: int, index: int) -> Example:
        try:
            example = unpack(self._records[source][index])
        except Exception as error:  # of msgpack and of the library, which raise nearly anything
            raise BadRecord(f"cannot be read ({error}); the record or its shard is damaged") from None
        _check_read(example, self.configs[source].path, index)
        return example

    def load(self, source: int, index: int, bucket: int) -> dict[str, np.ndarray]:
        del bucket  # latents have the size they were made with
        example = self._example(source, index)
        try:
            return collate(example, self.text_length, self.null_tail) | self.extend(example.text)
        except UserError as error:
            raise BadRecord(str(error)) from None

    def name(self, source: int, index: int) -> str:
        return f"record {index}"

    def digests(self) -> list[str]:
        """Of each folder: its shards' names and sizes, and some records."""

        def content(records: Sequence[bytes], index: int) -> bytes | None:
            try:
                return bytes(records[index])
            except Exception:  # of the library, which raises nearly anything; `load` says so
                return None

        return [
            place.digest(shards(config.path, info), [content(records, i) for i in place.looked_at(len(records))])
            for config, info, records in zip(self.configs, self.infos, self._records, strict=True)
        ]


@dataclasses.dataclass
class _Sizes:
    """Reads a folder before its sizes are known."""

    reader: LatentReader

    def __post_init__(self):
        self.lengths, self.bucket_of = self.reader.lengths, [None] * len(self.reader.lengths)
        self.configs = self.reader.configs
        self.load, self.name = lambda source, index, _: self.reader._example(source, index), self.reader.name


class _Rows:
    """Rows of one folder by index, for grain; bad ones replaced."""

    def __init__(self, reader: LatentReader, source: int, bad: BadRecords):
        self._reader, self._source, self._bad = reader, source, bad

    def __len__(self) -> int:
        return self._reader.lengths[self._source]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        loaded = reading.read(self._reader, self._source, int(index), 0)
        self._bad.read(1)
        for record, reason in loaded.bad:
            self._bad.add(self._reader.configs[self._source].path, record, reason)
        return loaded.item


def mixture(
    sources: Sequence[SourceConfig], *, batch_size: int, text_length: int, seed: int, threads: int,
    host: int = 0, hosts: int = 1, extend: Extend = no_fields, log: Path | None = None, max_bad_fraction: float = 0.01,
    on_change: str = "refuse",
) -> grain.IterDataset:  # fmt: skip
    """Endless, exact, deterministic mixture of latent folders; hosts' parts joined are the same for any host count.

    Where pictures have several sizes, every batch is of one (`mixture.Batches`).

    Args:
      batch_size: of all hosts together.
      extend: see `LatentReader`.
      log, max_bad_fraction: see `reading.BadRecords`.
      on_change: see `place.check`.
    """
    from dreamlite_jax.data.forms import Latents
    from dreamlite_jax.data.mixture import Batches, check_hosts

    check_hosts(batch_size, hosts)
    reader = LatentReader(sources, text_length, extend)
    bad = BadRecords(log, max_bad_fraction, sum(reader.lengths))
    weights = [source.weight for source in sources]
    if len(reader.sizes) > 1:
        vae, width = reader.infos[0]["vae"], len(reader.infos[0]["null_states"][0])
        factor = 2 ** (len(vae["encoder_blocks"]) - 1)
        shapes = [(height // factor, width_ // factor, vae["latent_channels"]) for width_, height in reader.sizes]
        return Batches(
            reader, Latents(shapes, text_length, width, reader.null_tail, extend("")), weights=weights,
            batch_size=batch_size, seed=seed, bad=bad, threads=threads, host=host, hosts=hosts, on_change=on_change,
        )  # fmt: skip
    streams = [
        grain.MapDataset.source(_Rows(reader, i, bad)).seed(seed + i).shuffle().repeat() for i in range(len(sources))
    ]
    stream = grain.MapDataset.mix(streams, weights) if len(streams) > 1 else streams[0]
    data = place.described(sources, reader.lengths, reader.digests(), seed)
    return place.Consecutive(
        stream, batch_size=batch_size, host=host, hosts=hosts, threads=threads, data=data, on_change=on_change
    )
