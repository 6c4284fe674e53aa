"""A place in the data: a number of samples of the mixture, and what the mixture was of.

Batches may be of another size when a run goes on; the samples in them follow each other as before. In other data the
same number means nothing, so a place is saved with what its data were, and refused in others (`check`).
"""

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from dreamlite_jax.data.config import SourceConfig
from dreamlite_jax.data.records import BadRecord
from dreamlite_jax.data.sources import Source
from dreamlite_jax.errors import UserError

LOOKED_AT = 16  # records of a source whose content is part of its digest
UNREADABLE = "-" * 8
CONTENT = (".jsonl", ".json")  # files that are part of it whole; of others names and sizes are


def described(
    configs: Sequence[SourceConfig], lengths: Sequence[int], digests: Sequence[str], seed: int
) -> dict[str, Any]:
    """What the order of samples follows from, as a checkpoint keeps it."""
    sources = [
        {
            "path": config.path, "name": config.name, "split": config.split, "kind": config.form,
            "weight": config.weight, "records": length, "digest": digest,
        }
        for config, length, digest in zip(configs, lengths, digests, strict=True)
    ]  # fmt: skip
    return {"seed": seed, "sources": sources}


def digest_of_source(source: Source) -> str:
    """Of a raw source (`digest`)."""

    def content(index: int) -> bytes | None:
        try:
            record = source[index]
        except BadRecord:
            return None
        pictures = [x if isinstance(x, bytes) else x.tobytes() for x in (record.target, record.source) if x is not None]
        return b"\0".join([record.task.encode(), record.text.encode(), *pictures])

    return digest(source.files, [content(index) for index in looked_at(len(source))])


def looked_at(count: int) -> list[int]:
    """Some indices of a source, from its first to its last."""
    return sorted({int(i) for i in np.linspace(0, count - 1, LOOKED_AT)})


def digest(files: Sequence[Path], contents: Sequence[bytes | None]) -> str:
    """Of files, by name and size (small ones that list records by content), and of some records, None for those that
    cannot be read. It is the same wherever the data are."""
    whole = hashlib.sha256()
    for path in sorted(files):
        whole.update(f"{path.name} {path.stat().st_size}\n".encode())
        if path.suffix in CONTENT:
            with path.open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
    parts = [UNREADABLE if content is None else hashlib.sha256(content).hexdigest()[:8] for content in contents]
    return " ".join([whole.hexdigest()[:16], *parts])


def alike(a: str, b: str) -> bool:
    """Whether two digests are of the same data. A record that could not be read makes no others of them."""
    ours, theirs = a.split(), b.split()
    if len(ours) != len(theirs):
        return False
    return all(x == y or UNREADABLE in (x, y) for x, y in zip(ours, theirs, strict=True))


def changes(saved: dict[str, Any], own: dict[str, Any]) -> list[str]:
    """What makes a place of the `saved` data meaningless in one's own; what an older version did not save is taken."""
    found = [f"config.seed is {own['seed']}, was {saved['seed']}"] if own["seed"] != saved["seed"] else []
    before, now = saved["sources"], own["sources"]
    if len(before) != len(now):
        paths = ", ".join(f"{source['path']} {source['name']}".strip() for source in before)
        return [*found, f"config.data.sources has {len(now)} entries, had {len(before)} ({paths})"]
    for i, (a, b) in enumerate(zip(before, now, strict=True)):
        where = f"config.data.sources[{i}]"
        if a["weight"] != b["weight"]:
            found.append(f"{where}.weight is {b['weight']:g}, was {a['weight']:g}")
        if "digest" in a and alike(a["digest"], b["digest"]):  # the same data, wherever they are now
            continue
        names = [
            f"{where}.{name} is {b[name]!r}, was {a[name]!r}"
            for name in ("path", "name", "split", "kind")
            if a[name] != b[name]
        ]
        if a.get("records", b["records"]) != b["records"]:
            names.append(f"{where} ({b['path']}) has {b['records']} records, had {a['records']}")
        elif "digest" in a and not names:
            names.append(f"{where} ({b['path']}) has as many records as before, but other ones")
        found += names
    return found


def check(saved: dict[str, Any], own: dict[str, Any], on_change: str, *, tell: bool = True) -> bool:
    """Whether a place holds. If it does not, that is an error, or with `on_change` "restart" is said.

    Raises:
      UserError: the data are others than those that the place was counted in.
    """
    if not (found := changes(saved, own)):
        return True
    what = "; ".join(found)
    if on_change != "restart":
        raise UserError(
            f"the place in the data that this run had reached means nothing in other data: {what}. Restore them (a "
            "missing shard counts), use another --workdir (config.init_from can name this one), or go on with these "
            "from their beginning by --config.data.on_change=restart"
        )
    if tell:
        print(f"the run goes on from the beginning of other data: {what}", file=sys.stderr, flush=True)
    return False


def upgraded(position: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The place that a run saved before places said what their data were; `config` is that run's, as a mapping.

    It counted batches (`next_index`) where all pictures have one size.
    """
    if "data" in position or not position.keys() & {"next_index", "records"}:
        return position
    sources = []
    for i, source in enumerate(config["data"]["sources"]):
        kind = source.get("kind") or ("sprites" if source["name"] else "latents")
        known = {name: source[name] for name in ("path", "name", "split", "weight")} | {"kind": kind}
        sources.append(known | ({"records": position["records"][i]} if "records" in position else {}))
    samples = {"samples": position["next_index"] * config["data"]["batch_size"]} if "next_index" in position else {}
    return {**position, **samples, "data": {"seed": config["seed"], "sources": sources}}


# --- batches of a stream whose samples have one shape


class HostShare(grain.MapDataset):
    """Of every `batch_size` elements of a stream from `start` on, one after the other, those of this host."""

    def __init__(self, parent: grain.MapDataset, batch_size: int, host: int, hosts: int, start: int = 0):
        super().__init__(parent)
        self._batch_size, self._share, self._start = batch_size, batch_size // hosts, start
        self._first = start + host * self._share

    def __len__(self) -> int:
        return (len(self._parent) - self._start) // self._batch_size * self._share

    def __getitem__(self, index: int) -> Any:
        batch, row = divmod(index, self._share)
        return self._parent[batch * self._batch_size + self._first + row]


class Consecutive(grain.IterDataset):
    """Endless batches of this host, of consecutive samples of a stream.

    Args:
      stream: of samples, in the order of all hosts together.
      batch_size: of all hosts together.
      data: see `described`. on_change: see `check`.
    """

    def __init__(
        self, stream: grain.MapDataset, *, batch_size: int, host: int, hosts: int, threads: int, data: dict[str, Any],
        on_change: str,
    ):  # fmt: skip
        super().__init__()
        self.stream, self.batch_size, self.host, self.hosts = stream, batch_size, host, hosts
        self.data, self.on_change = data, on_change
        self._options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * max(1, threads))

    def batches_from(self, samples: int) -> grain.DatasetIterator:
        """Batches that begin after so many samples of the stream."""
        mine = HostShare(self.stream, self.batch_size, self.host, self.hosts, samples)
        return iter(mine.batch(self.batch_size // self.hosts, drop_remainder=True).to_iter_dataset(self._options))

    def __iter__(self) -> "ConsecutiveIterator":
        return ConsecutiveIterator(self)


class ConsecutiveIterator(grain.DatasetIterator):
    """Its state is the number of samples that were given out to all hosts together."""

    def __init__(self, batches: Consecutive):
        super().__init__()
        self._batches, self._samples = batches, 0
        self._inner = batches.batches_from(0)

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._inner)
        self._samples += self._batches.batch_size
        return batch

    def get_state(self) -> dict[str, Any]:
        return {"samples": self._samples, "data": self._batches.data}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a saved place. Raises `UserError` where it is one of other data."""
        batches = self._batches
        holds = check(state["data"], batches.data, batches.on_change, tell=batches.host == 0)
        self._inner.close()
        self._samples = state["samples"] if holds else 0
        self._inner = batches.batches_from(self._samples)

    def close(self) -> None:
        """Stops reading ahead."""
        self._inner.close()
        super().close()
