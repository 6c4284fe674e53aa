"""Reading samples that may be damaged: what cannot be used is replaced by another record, counted and logged.

The replacement is a function of the record alone, so the order of samples is the same on every host, for any number of
hosts, and after a restart. No JAX and no grain here: worker processes import this module.
"""

import dataclasses
import json
import math
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dreamlite_jax.data import place, transforms
from dreamlite_jax.data.buckets import Size
from dreamlite_jax.data.config import SourceConfig
from dreamlite_jax.data.fit import check_limits
from dreamlite_jax.data.records import BadRecord
from dreamlite_jax.data.sources import Source, open_source
from dreamlite_jax.errors import UserError

TRIES = 100  # records in a row that cannot be used: the data are not what the config says
LOOKED_AT = 1000  # records at the beginning of a source, to find some that are alike
LEAST_READ = 1000  # reads that the share of bad records is taken of, at least, so that an early one does not stop a run


class BadRecords:
    """Counts and names the records that could not be used; above a share of those read it stops the run.

    Args:
      path: of the log, one JSON object a record with `source`, `record` and `reason`; None keeps none.
      max_fraction: of the records read (of at least a thousand, or of all, if there are fewer).
      total: records of all sources.
    """

    def __init__(self, path: Path | None, max_fraction: float, total: int):
        self.path, self.max_fraction, self.total = path, max_fraction, total
        self.count = 0
        self._reads = 0
        self._lock = threading.Lock()
        self._named: set[tuple[str, str]] = set()
        if path is not None and path.is_file():  # of this run before it was interrupted
            rows = (json.loads(line) for line in path.read_text().splitlines() if line.endswith("}"))
            self._named = {(row["source"], row["record"]) for row in rows}

    def read(self, count: int) -> None:
        """Records were read, good or bad."""
        with self._lock:
            self._reads += count

    def add(self, source: str, record: str, reason: str) -> None:
        """A record could not be used.

        Raises:
          UserError: there are too many of them.
        """
        with self._lock:
            self.count += 1
            if (source, record) not in self._named:
                self._named.add((source, record))
                self._write({"source": source, "record": record, "reason": reason})
            allowed = self.max_fraction * max(self._reads, min(LEAST_READ, self.total))
            if self.count > allowed:
                log = f"; all are in {self.path}" if self.path else ""
                raise UserError(
                    f"{self.count} of {max(self._reads, self.count)} records read cannot be used, more than the share "
                    f"max_bad_fraction {self.max_fraction:g} allows: {source} {record}: {reason}{log}"
                )

    def shards(self, source: str, missing: Sequence[str], share: float) -> None:
        """Whole shards are left out.

        Raises:
          UserError: they are more than the share allowed.
        """
        with self._lock:
            for name in missing:
                if (source, name) not in self._named:
                    self._named.add((source, name))
                    self._write({"source": source, "record": name, "reason": "shard left out"})
        if missing and share > self.max_fraction:
            raise UserError(
                f"source {source}: {len(missing)} shard(s) are missing or damaged, such as {missing[0]}; that is "
                f"{share:.1%} of it, more than max_bad_fraction {self.max_fraction:g} allows: restore them or raise it"
            )

    def _write(self, row: dict[str, str]) -> None:
        if len(self._named) == 1:
            log = f"; all such are named in {self.path}" if self.path else ""
            print(f"left out: {row['source']} {row['record']}: {row['reason']}{log}", file=sys.stderr, flush=True)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")


def log_path(folder: Path, host: int) -> Path:
    """Where a host names bad records."""
    return folder / "bad_records" / f"host_{host}.jsonl"


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A sample that could be read. `bad` names the records tried before it, and why they could not."""

    item: Any
    index: int
    bad: tuple[tuple[str, str], ...] = ()


class Reader(Protocol):
    """Loads samples of several sources; can be pickled for worker processes."""

    configs: Sequence[SourceConfig]
    lengths: Sequence[int]
    bucket_of: Sequence[np.ndarray | None]  # of each source, the bucket of each of its records; None: all are of 0

    def load(self, source: int, index: int, bucket: int) -> Any:
        """The sample, in the shape of the bucket. Raises `BadRecord`."""

    def name(self, source: int, index: int) -> str: ...

    def digests(self) -> list[str]:
        """Of each source's content (`place.digest`)."""


def read(reader: Reader, source: int, index: int, bucket: int, refused: Sequence[int] = ()) -> Loaded:
    """The sample, or the first of its substitutes that can be read.

    Args:
      refused: indices that the caller cannot use.

    Raises:
      UserError: none of many can be.
    """
    bad = []
    for tried, candidate in enumerate(substitutes(index, bucket, reader.lengths[source], reader.bucket_of[source])):
        if tried >= TRIES:
            break
        if candidate in refused:
            continue
        try:
            return Loaded(reader.load(source, candidate, bucket), candidate, tuple(bad))
        except BadRecord as error:
            bad.append((reader.name(source, candidate), str(error)))
    first = f": {bad[0][0]}: {bad[0][1]}" if bad else ""
    path = reader.configs[source].path
    raise UserError(f"source {path}: none of {len(bad) + len(refused)} records tried in a row can be used{first}")


def substitutes(index: int, bucket: int, length: int, buckets: np.ndarray | None) -> Iterator[int]:
    """The index, then every other index of the same bucket, in leaps that leave a damaged shard behind at once."""
    leap = next(n for n in range(max(1, round(length * 0.618)), 2 * length + 2) if math.gcd(n, length) == 1)
    for i in range(length):
        candidate = (index + i * leap) % length
        if i == 0 or buckets is None or buckets[candidate] == bucket:
            yield candidate


class RawReader:
    """Pictures and words of raw sources, cut to buckets.

    Args:
      sizes: (width, height) of each bucket.
    """

    def __init__(
        self, configs: Sequence[SourceConfig], sizes: Sequence[Size], bucket_of: Sequence[np.ndarray | None] = ()
    ):
        self.configs, self.sizes = tuple(configs), tuple(sizes)
        self.bucket_of = tuple(bucket_of) or (None,) * len(self.configs)
        self._sources: tuple[Source, ...] | None = None
        self.lengths = tuple(len(source) for source in self.sources)

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources, opened once in every process."""
        if self._sources is None:
            self._sources = tuple(open_source(config) for config in self.configs)
        return self._sources

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_sources": None}

    def load(self, source: int, index: int, bucket: int) -> transforms.Item:
        config, record = self.configs[source], self.sources[source][index]
        if config.least_side or config.most_cut < 1:
            check_limits(transforms.picture_size(record.target), self.sizes, config)
        return transforms.item(record, self.sizes[bucket], changed_levels=config.changed_levels)

    def name(self, source: int, index: int) -> str:
        return self.sources[source].name(index)

    def digests(self) -> list[str]:
        return [place.digest_of_source(source) for source in self.sources]


# --- in worker processes

_reader: Reader | None = None


def start_worker(reader: Reader) -> None:
    """Gives this process its reader."""
    global _reader
    _reader = reader


def read_in_worker(samples: Sequence[tuple[int, int]], bucket: int) -> list[Loaded]:
    """`read` for each (source, index), in a process that was given its reader."""
    return [read(_reader, source, index, bucket) for source, index in samples]
