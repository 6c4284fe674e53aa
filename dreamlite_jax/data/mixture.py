"""Batches of a mixture of sources, each of one bucket: exact, deterministic, sharded by host, resumable to the sample.

Global batch k is the same samples in the same order for any number of hosts, of which host p of n has the p-th part;
and what the iterator saves is the same on every one.
"""

import contextlib
import multiprocessing
import sys
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import grain
import numpy as np

from dreamlite_jax.data import place, reading
from dreamlite_jax.data.buckets import Plan, Size, Stream, bucket_sizes
from dreamlite_jax.data.config import BucketConfig, DataConfig, SourceConfig
from dreamlite_jax.data.fit import check_limits, summary
from dreamlite_jax.data.index import bucket_table, picture_sizes, sampled_sizes
from dreamlite_jax.data.reading import BadRecords, Loaded, Reader
from dreamlite_jax.data.records import BadRecord
from dreamlite_jax.data.sources import Source, open_source
from dreamlite_jax.data.transforms import Item, picture_size
from dreamlite_jax.data.transforms import item as transform
from dreamlite_jax.errors import UserError
from dreamlite_jax.text.encoder import PromptEncoder, PromptRequest, PromptTooLong, null_tails

GROUP = 8  # samples that a worker reads in one go
AHEAD = 2  # batches read ahead of the one in use

Batch = dict[str, np.ndarray]


class Form(Protocol):
    """How samples become a batch."""

    def empty(self, bucket: int, rows: int) -> Batch:
        """Arrays for a batch."""

    def fill(self, batch: Batch, row: int, item: Any) -> None:
        """Writes one sample into its row; called from several threads, for different rows."""

    def request(self, item: Any) -> PromptRequest:
        """What the text encoder is asked for a sample."""


def check_hosts(batch_size: int, hosts: int) -> None:
    """Raises `UserError` unless a global batch can be shared out evenly."""
    if batch_size % hosts:
        raise UserError(f"data.batch_size {batch_size} is not a multiple of the {hosts} hosts")


class Batches(grain.IterDataset):
    """Endless batches of this host.

    Args:
      weights: of each of the reader's sources.
      batch_size: of all hosts together.
      threads, processes: that read; processes, if there are any, do the work and threads only wait for them.
      bad: where records that cannot be used are counted.
      encoder: gives each batch `text` (b, s, d) and `mask` (b, s) of `text_length` tokens; None gives none.
      on_change: see `place.check`.
    """

    def __init__(
        self, reader: Reader, form: Form, *, weights: Sequence[float], batch_size: int, seed: int, bad: BadRecords,
        threads: int, processes: int = 0, host: int = 0, hosts: int = 1, encoder: PromptEncoder | None = None,
        text_length: int = 0, on_change: str = "refuse",
    ):  # fmt: skip
        super().__init__()
        check_hosts(batch_size, hosts)
        self.data, self.on_change = place.described(reader.configs, reader.lengths, reader.digests(), seed), on_change
        self.reader, self.form, self.bad = reader, form, bad
        self.batch_size, self.host, self.hosts = batch_size, host, hosts
        self.threads, self.processes = max(1, threads), processes
        self.encoder, self.text_length = encoder, text_length
        self._stream = Stream(tuple(reader.lengths), tuple(weights), seed)

    def plan(self) -> Plan:
        """The order of global batches, from its beginning."""
        return Plan(self._stream, self.reader.bucket_of, self.batch_size)

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(self)


def raw_batches(
    data: DataConfig, make_form: Callable[[Sequence[Size]], Form], *, seed: int, host: int = 0, hosts: int = 1,
    log: Path | None = None, encoder: PromptEncoder | None = None,
) -> Batches:  # fmt: skip
    """Batches of raw sources.

    Args:
      make_form: the form of a batch, given the buckets' sizes (width, height).
      log: file to name bad records in.
      encoder: see `Batches`.

    Raises:
      UserError: a source cannot be opened, or too much of it is missing.
    """
    sources = [open_source(config) for config in data.sources]
    bad = BadRecords(log, data.max_bad_fraction, sum(map(len, sources)))
    for config, source in zip(data.sources, sources, strict=True):
        bad.shards(config.path, source.missing, source.missing_share)
    sizes = source_sizes(data.buckets, sources)
    tables: list[np.ndarray | None] = [None] * len(sources)
    for i, (source, config) in enumerate(zip(sources, data.sources, strict=True)):
        looked, of = range(len(source)), ""
        if len(sizes) > 1:
            found = picture_sizes(source, config, data.threads)
            tables[i] = bucket_table(found, config, sizes)
        elif config.form != "sprites" and host == 0:
            looked, found = sampled_sizes(source, data.threads)
            of = f"{len(looked):,} of {len(source):,} records looked at" if len(looked) < len(source) else ""
        else:
            continue
        if host == 0:
            names = [source.name, looked]
            for line in summary(sizes, found, config, lambda row, names=names: names[0](int(names[1][row])), of):
                print(line, file=sys.stderr, flush=True)
    reader = reading.RawReader(data.sources, sizes, tables)
    return Batches(
        reader, make_form(sizes), weights=[config.weight for config in data.sources], batch_size=data.batch_size,
        seed=seed, bad=bad, threads=data.threads, processes=data.processes, host=host, hosts=hosts, encoder=encoder,
        text_length=data.text_length, on_change=data.on_change,
    )  # fmt: skip


def source_sizes(config: BucketConfig, sources: Sequence[Source], where: str = "config.data.buckets") -> list[Size]:
    """The buckets of raw sources. Raises `UserError` where the config leaves out what the sources do not say; `where`
    is the place of the buckets in it."""
    if config.size:
        return list(bucket_sizes(config))
    own = {getattr(source, "size", 0) for source in sources}
    if len(own) > 1 or own == {0}:
        raise UserError(f"{where}.size is 0; pictures other than sprites of one size need one, such as 256")
    return [(size, size) for size in own]


def first_items(config: SourceConfig, buckets: BucketConfig, count: int) -> tuple[Size, list[Item]]:
    """The first samples of a raw source that have one bucket and task, and its size, for a picture of them."""
    source = open_source(config)
    sizes, found, kind = source_sizes(buckets, [source]), [], None
    for index in range(min(reading.LOOKED_AT, len(source))):
        with contextlib.suppress(BadRecord):  # training names it
            record = source[index]
            own = (check_limits(picture_size(record.target), sizes, config), record.task)
            if kind in (None, own):
                found.append(transform(record, sizes[own[0]], changed_levels=config.changed_levels))
                kind = own
        if len(found) == count:
            break
    if not found:
        raise UserError(f"none of the first records of source {config.path} can be used")
    return sizes[kind[0]], found


class BatchIterator(grain.DatasetIterator):
    """Reads ahead with a pool of workers; its state is that of the plan after the batch that was last given out."""

    def __init__(self, batches: Batches):
        super().__init__()
        self._batches, self._plan = batches, batches.plan()
        self._state = self._plan.state()
        self._reading: deque[_Pending] = deque()
        workers = batches.processes or batches.threads
        self._threads = ThreadPoolExecutor(workers, "reader")
        pools: list[Any] = [self._threads]
        self._load: Callable[[Sequence[tuple[int, int]], int], list[Loaded]] = self._load_here
        if batches.processes:
            pool = ProcessPoolExecutor(
                workers, multiprocessing.get_context("forkserver"), reading.start_worker, (batches.reader,)
            )
            pools.append(pool)
            self._load = lambda samples, bucket: pool.submit(reading.read_in_worker, samples, bucket).result()
        self._finalizer = weakref.finalize(self, _shut_down, pools)

    def __next__(self) -> Batch:
        while len(self._reading) <= AHEAD:
            self._reading.append(_Pending(self))
        pending = self._reading.popleft()
        loaded = pending.wait()
        batches = self._batches
        batches.bad.read(len(loaded))
        for (source, _), sample in zip(pending.samples, loaded, strict=True):
            for record, reason in sample.bad:
                batches.bad.add(self._source_name(source), record, reason)
        if batches.encoder is not None:
            pending.batch |= self._encode(pending, loaded)
        self._state = pending.state
        return pending.batch

    def _load_here(self, samples: Sequence[tuple[int, int]], bucket: int) -> list[Loaded]:
        return [reading.read(self._batches.reader, source, index, bucket) for source, index in samples]

    def _source_name(self, source: int) -> str:
        config = self._batches.reader.configs[source]
        return f"{config.path} {config.name}".strip()

    def _encode(self, pending: "_Pending", loaded: list[Loaded]) -> Batch:
        """Fields of the batch's prompts. A prompt that the encoder refuses makes its record a bad one."""
        batches = self._batches
        refused: dict[int, list[int]] = {}
        while True:
            requests = [batches.form.request(sample.item) for sample in loaded]
            try:
                return text_fields(batches.encoder, requests, batches.text_length)
            except UserError:
                if not (bad := refusals(batches.encoder, requests, batches.text_length)):
                    raise
            for row, error in bad:
                source, index = pending.samples[row]
                name = batches.reader.name(source, loaded[row].index)
                long = isinstance(error, PromptTooLong)
                more = "; config.data.text_length and config.model.text.max_length set the limit" if long else ""
                batches.bad.add(self._source_name(source), name, f"{error}{more}")
                refused.setdefault(row, []).append(loaded[row].index)
                loaded[row] = reading.read(batches.reader, source, index, pending.bucket, refused[row])
                batches.form.fill(pending.batch, row, loaded[row].item)

    def get_state(self) -> dict[str, Any]:
        return {**self._state, "data": self._batches.data}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a saved place. Raises `UserError` where it is one of other data."""
        batches, self._plan = self._batches, self._batches.plan()
        if place.check(state["data"], batches.data, batches.on_change, tell=batches.host == 0):
            self._plan.restore(state)
        self._state = self._plan.state()
        self._reading.clear()

    def close(self) -> None:
        """Stops the workers."""
        self._reading.clear()
        self._finalizer()
        super().close()


def text_fields(encoder: PromptEncoder, requests: Sequence[PromptRequest], length: int) -> Batch:
    """text (b, s, d), mask (b, s); null_tail (b, t, d) and null_from (b,) too where the encoder looks at pictures."""
    states, mask = encoder.encode(requests, length)
    null = {}
    if encoder.null_tail:
        null = dict(zip(("null_tail", "null_from"), null_tails(encoder, requests), strict=True))
    return {"text": states, "mask": mask, **null}


def refusals(
    encoder: PromptEncoder, requests: Sequence[PromptRequest], length: int | None = None
) -> list[tuple[int, UserError]]:
    """Which of the prompts an encoder does not take, and why."""
    found = []
    for row, request in enumerate(requests):
        try:
            encoder.encode([request], length)
        except UserError as error:
            found.append((row, error))
    return found


def _shut_down(pools: Sequence[Any]) -> None:
    for pool in pools:
        pool.shutdown(wait=False, cancel_futures=True)


class _Pending:
    """A batch that is being read: this host's samples, its arrays and the plan's state after it."""

    def __init__(self, iterator: BatchIterator):
        batches = iterator._batches
        self.bucket, samples = iterator._plan.next()
        self.state = iterator._plan.state()
        share = len(samples) // batches.hosts
        mine = samples[batches.host * share : (batches.host + 1) * share].tolist()
        self.samples: list[tuple[int, int]] = [(source, index) for source, index in mine]
        self.batch = batches.form.empty(self.bucket, len(self.samples))
        starts = range(0, len(self.samples), GROUP)
        self._groups: list[Future] = [iterator._threads.submit(self._read, iterator, start) for start in starts]

    def _read(self, iterator: BatchIterator, start: int) -> list[Loaded]:
        loaded = iterator._load(self.samples[start : start + GROUP], self.bucket)
        for row, sample in enumerate(loaded, start):
            iterator._batches.form.fill(self.batch, row, sample.item)
        return loaded

    def wait(self) -> list[Loaded]:
        return [sample for group in self._groups for sample in group.result()]
