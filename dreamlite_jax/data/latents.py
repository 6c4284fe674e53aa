"""Precomputed examples: latents and text states in ArrayRecord shards, written by `precompute`, read by training.

A folder holds `latents-00000-of-00004.array_record`, …, and `info.json`, written last: without it the folder is
incomplete.
"""

import dataclasses
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import msgpack
import numpy as np

from dreamlite_jax.errors import UserError
from dreamlite_jax.training.config import SourceConfig

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Example:
    """One training example.

    Attributes:
      target: (h, w, c) latents. source: the same of an edit's source, else None.
      changed: (h, w) share of each latent pixel's area that the edit changes, else None.
      states: (s, d) text states without padding. size: (width, height) of the target in pixels.
    """

    id: str
    task: str
    text: str
    target: np.ndarray
    source: np.ndarray | None
    changed: np.ndarray | None
    states: np.ndarray
    size: tuple[int, int]


def pack(example: Example) -> bytes:
    """Record of an example; arrays as float16 with their shapes."""
    fields = dataclasses.asdict(example)
    for name in ("target", "source", "changed", "states"):
        array = fields[name]
        fields[name] = None if array is None else [list(array.shape), np.asarray(array, np.float16).tobytes()]
    return msgpack.packb(fields)


def unpack(record: bytes) -> Example:
    """The example of a record, arrays in float32."""
    fields = msgpack.unpackb(record)
    for name in ("target", "source", "changed", "states"):
        if fields[name] is not None:
            shape, data = fields[name]
            fields[name] = np.frombuffer(data, np.float16).reshape(shape).astype(np.float32)
    fields["size"] = tuple(fields["size"])
    return Example(**fields)


def shard_path(directory: Path, index: int, count: int) -> Path:
    return directory / f"latents-{index:05d}-of-{count:05d}.array_record"


def write_shard(path: Path, examples: Iterator[Example]) -> None:
    """Writes one shard under a temporary name and renames it when whole."""
    from array_record.python import array_record_module

    for stale in path.parent.glob(f"{path.stem}.*.tmp"):  # of an attempt that was killed; nobody else writes this shard
        stale.unlink()
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
    try:
        for example in examples:
            writer.write(pack(example))
    except BaseException:
        writer.close()
        temporary.unlink(missing_ok=True)
        raise
    writer.close()
    os.replace(temporary, path)


def write_info(directory: Path, info: dict[str, Any], null_states: np.ndarray) -> None:
    """Marks a folder complete. `null_states` (s, d) is the empty prompt, for dropped text."""
    info = {"format": FORMAT, **info, "null_states": np.asarray(null_states, np.float32).tolist()}
    temporary = directory / f"info.json.{uuid.uuid4().hex}.tmp"  # several hosts may get here at the same moment
    temporary.write_text(json.dumps(info))
    os.replace(temporary, directory / "info.json")


def read_info(directory: str | os.PathLike) -> dict[str, Any]:
    """Facts of a complete folder.

    Raises:
      UserError: not such a folder, or an incomplete one.
    """
    path = Path(directory) / "info.json"
    if not path.is_file():
        raise UserError(
            f"{directory} holds no complete set of latents (no info.json); "
            "make one with python -m dreamlite_jax.precompute"
        )
    info = json.loads(path.read_text())
    if info.get("format") != FORMAT:
        raise UserError(f"{path} has format {info.get('format')}; this version reads {FORMAT}: precompute again")
    missing = [p.name for p in shards(directory, info) if not p.is_file()]
    if missing:
        raise UserError(f"{directory} lacks shard {missing[0]} ({len(missing)} missing); precompute again")
    return info


def shards(directory: str | os.PathLike, info: dict[str, Any]) -> list[Path]:
    return [shard_path(Path(directory), i, info["shards"]) for i in range(info["shards"])]


def open_examples(directory: str | os.PathLike) -> Sequence[bytes]:
    """Random-access records of a complete folder."""
    info = read_info(directory)
    return grain.sources.ArrayRecordDataSource([str(path) for path in shards(directory, info)])


def collate(example: Example, text_length: int) -> dict[str, np.ndarray]:
    """Fixed shapes of one example: target, source (zeros when generating), weight, text, mask, editing, size.

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
    weight = np.ones(example.target.shape[:2], np.float32)
    if example.changed is not None and example.changed.any():
        ratio = example.changed.size / example.changed.sum()
        weight += (example.changed > 0) * np.log2(ratio).astype(np.float32)
    return {
        "target": example.target,
        "source": np.zeros_like(example.target) if example.source is None else example.source,
        "weight": weight[..., None],
        "text": text,
        "mask": (np.arange(text_length) < tokens).astype(np.float32),
        "editing": np.float32(example.source is not None),
        "size": np.asarray(example.size, np.float32),
    }


def mixture(
    sources: Sequence[SourceConfig], *, batch_size: int, text_length: int, seed: int, threads: int,
    host: int = 0, hosts: int = 1,
) -> grain.IterDataset:  # fmt: skip
    """Endless, exact, deterministic mixture of latent folders: the union over hosts is the same for any host count.

    Args:
      batch_size: of all hosts together.
    """
    if batch_size % hosts:
        raise UserError(f"data.batch_size {batch_size} is not a multiple of the {hosts} hosts")
    streams = [
        grain.MapDataset.source(open_examples(source.path)).seed(seed + i).shuffle().repeat()
        for i, source in enumerate(sources)
    ]
    weights = [source.weight for source in sources]
    stream = grain.MapDataset.mix(streams, weights) if len(streams) > 1 else streams[0]
    stream = stream[host::hosts].map(lambda record: collate(unpack(record), text_length))
    stream = stream.batch(batch_size // hosts, drop_remainder=True)
    return stream.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * max(1, threads)))
