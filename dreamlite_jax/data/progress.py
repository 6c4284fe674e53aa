"""Work that takes long: read ahead, and how far it is."""

import itertools
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

T = TypeVar("T")
R = TypeVar("R")
TELL_EVERY = 5.0  # seconds


def ahead(pool: ThreadPoolExecutor, function: Callable[[T], R], values: Iterable[T], count: int) -> Iterator[R]:
    """`map` over a pool that keeps at most `count` results waiting."""
    values = iter(values)
    running = deque(pool.submit(function, value) for value in itertools.islice(values, count))
    while running:
        result = running.popleft().result()
        running.extend(pool.submit(function, value) for value in itertools.islice(values, 1))
        yield result


class Progress:
    """The size to expect, then a line every few seconds."""

    def __init__(self, todo: int, total: int):
        self._todo, self._total, self._done = todo, total, 0
        self._started = self._printed = time.monotonic()

    def skip(self) -> None:
        """A record was left out."""
        self._todo -= 1

    def add(self, packed: Sequence[bytes]) -> None:
        """These records were encoded."""
        if not packed:
            return
        now = time.monotonic()
        if not self._done:
            each = np.mean([len(record) for record in packed])
            say(f"{self._total} records, about {each * self._total / 1e6:.0f} MB in all")
        self._done += len(packed)
        if now - self._printed > TELL_EVERY or self._done == self._todo:
            rate = self._done / (now - self._started + 1e-9)
            left = (self._todo - self._done) / rate
            say(f"encoded {self._done}/{self._todo}  {rate:.0f} records/s  ETA {left:.0f}s")
            self._printed = now


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
