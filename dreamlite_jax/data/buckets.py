"""Aspect-ratio buckets, and the order in which a mixture's samples become batches of one bucket each.

    sizes = bucket_sizes(BucketConfig(size=256, multiple=32, max_ratio=2.0))    # ((352, 192), …, (256, 256), …)
    plan = Plan(Stream(lengths, weights, seed), bucket_of, batch_size=64)
    bucket, samples = plan.next()                                                # (n, 2) of (source, index)

The samples of all hosts form one stream (`Stream`): sources in exact proportion, each shuffled anew every epoch. A
batch needs samples of one shape, so each sample goes on a pile of its bucket, and a pile of a batch's size is a batch.
Every sample is therefore used exactly once an epoch and none is ever dropped; batches hold the stream's samples to
within the piles, which are below one batch a bucket at any time. With one bucket, batches are the stream itself, cut.

All of this is arithmetic on numbers that every host has: it does not depend on how many hosts there are.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from dreamlite_jax.data.config import BucketConfig
from dreamlite_jax.errors import UserError

Size = tuple[int, int]  # width, height in pixels
LONGEST_PATTERN = 100_000  # samples after which the pattern of a mixture repeats, at most


def bucket_sizes(config: BucketConfig) -> tuple[Size, ...]:
    """(width, height) of every bucket, widest first.

    For each width that is a multiple, the height whose multiple is nearest to the area, while neither side is more than
    `max_ratio` times the other; of those with the same shape as another transposed, both are there.
    """
    area, step = config.size**2, config.multiple
    found = set()
    for width in range(step, int(config.size * config.max_ratio) + step, step):
        height = max(step, round(area / width / step) * step)
        if max(width, height) <= config.max_ratio * min(width, height):
            found |= {(width, height), (height, width)}
    return tuple(sorted(found, key=lambda size: (-size[0] / size[1], size)))


def check_sizes(where: str, sizes: Iterable[Size], multiple: int, network: str) -> None:
    """Raises `UserError` unless every side is a multiple; `where` gives these sizes, and `network` needs that."""
    for width, height in sizes:
        if width % multiple or height % multiple:
            raise UserError(
                f"{where} gives pictures of {width}x{height}; {network} needs multiples of {multiple} pixels: set "
                "buckets.multiple to one of them"
            )


def nearest_bucket(sizes: Sequence[Size], pictures: np.ndarray) -> np.ndarray:
    """(n,) index of the bucket whose aspect ratio is nearest (by its logarithm) to each picture's (n, 2) size."""
    ratios = np.log([width / height for width, height in sizes])
    pictures = np.asarray(pictures, np.float64).reshape(-1, 2)
    wanted = np.log(pictures[:, 0] / pictures[:, 1])
    return np.abs(wanted[:, None] - ratios[None]).argmin(1).astype(np.int32)


# --- the stream of samples


def pattern(weights: Sequence[float]) -> np.ndarray:
    """(n,) source of each sample of a mixture, to be repeated: after any number of samples, every source has had its
    share to within one.

    Sources are served by the earliest deadline (R. Tijdeman, The chairman assignment problem, 1980): the j-th sample of
    a source of share r is due before position j/r and may not come before (j-1)/r.
    """
    shares = _shares(weights)
    length = sum(shares)
    served, order = [0] * len(shares), np.zeros(length, np.int32)
    for position in range(length):
        open_ = [s for s, share in enumerate(shares) if served[s] * length < share * (position + 1)]
        chosen = min(open_, key=lambda s: (Fraction((served[s] + 1) * length, shares[s]), s))
        order[position] = chosen
        served[chosen] += 1
    return order


def _shares(weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to the weights: exactly, if they are small, else to one in `LONGEST_PATTERN`."""
    fractions = [Fraction(weight).limit_denominator(1000) for weight in weights]
    shares = [int(f * math.lcm(*(f.denominator for f in fractions))) for f in fractions]
    if not all(math.isclose(f, w, rel_tol=1e-9) for f, w in zip(fractions, weights, strict=True)) or (
        sum(shares) // math.gcd(*shares) > LONGEST_PATTERN
    ):
        total = math.fsum(weights)
        shares = [max(1, round(weight / total * LONGEST_PATTERN)) for weight in weights]
    divisor = math.gcd(*shares)
    return [share // divisor for share in shares]


def permuted(indices: np.ndarray, length: int, keys: np.ndarray) -> np.ndarray:
    """Where a random permutation of range(length) puts each index; nothing of its size is held in memory.

    A Feistel network over a power of four at least as large as `length`; what falls outside goes through again.

    Args:
      keys: (n, rounds) uint64 of each index's permutation.
    """
    half = max(4, -(-(length - 1).bit_length() // 2))
    mask = np.uint64((1 << half) - 1)
    values = np.asarray(indices, np.uint64).copy()
    todo = np.arange(len(values))
    while len(todo):
        left, right = values[todo] >> np.uint64(half), values[todo] & mask
        for round_ in range(keys.shape[1]):
            left, right = right, left ^ (_mixed(right + keys[todo, round_]) & mask)
        values[todo] = (left << np.uint64(half)) | right
        todo = todo[values[todo] >= length]
    return values.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every bit of the result depends on every bit of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclasses.dataclass(frozen=True)
class Stream:
    """The endless sequence of samples of a mixture: any part of it at once, from positions alone.

    Args:
      lengths: records of each source. weights: their parts of the mixture.
    """

    lengths: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int
    rounds: int = 6

    def __post_init__(self):
        order = pattern(self.weights)
        ranks = np.zeros(len(order), np.int64)
        for source in range(len(self.lengths)):
            mine = order == source
            ranks[mine] = np.arange(mine.sum())
        counts = np.bincount(order, minlength=len(self.lengths))
        object.__setattr__(self, "_tables", (order, ranks, counts))

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """(n, 2) of (source, index) at these positions of the stream."""
        order, ranks, counts = self._tables
        positions = np.asarray(positions, np.int64)
        cycle, place = np.divmod(positions, len(order))
        sources = order[place]
        shown = cycle * counts[sources] + ranks[place]  # samples of this source before
        indices = np.zeros(len(positions), np.int64)
        for source, length in enumerate(self.lengths):
            mine = np.flatnonzero(sources == source)
            if len(mine):
                epoch, index = np.divmod(shown[mine], length)
                indices[mine] = permuted(index, length, self._keys(source, epoch))
        return np.stack([sources.astype(np.int64), indices], 1)

    def _keys(self, source: int, epochs: np.ndarray) -> np.ndarray:
        base = np.uint64((self.seed * 0x9E3779B97F4A7C15 + source * 0xD1342543DE82EF95 + 1) % 2**64)
        keys = _mixed(base + epochs.astype(np.uint64) * np.uint64(0x2545F4914F6CDD1D))
        steps = np.arange(1, self.rounds + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return _mixed(keys[:, None] + steps[None])


# --- batches of one bucket each


class Plan:
    """The global batches in order. `state` is small, the same on every host, and all that a resumed run needs.

    Args:
      bucket_of: for each source the bucket of each of its records, (length,), or None where all are of bucket 0.
    """

    def __init__(self, stream: Stream, bucket_of: Sequence[np.ndarray | None], batch_size: int):
        self.stream, self.bucket_of, self.batch_size = stream, bucket_of, batch_size
        self._next = 0  # position of the stream up to which samples are on piles
        self._piles: dict[int, list[int]] = {}  # positions, by bucket, ascending

    def next(self) -> tuple[int, np.ndarray]:
        """Bucket and (batch_size, 2) samples of the next batch."""
        while not (full := [bucket for bucket, pile in self._piles.items() if len(pile) >= self.batch_size]):
            positions = np.arange(self._next, self._next + self.batch_size)
            for bucket, position in zip(self._buckets(positions).tolist(), positions.tolist(), strict=True):
                self._piles.setdefault(bucket, []).append(position)
            self._next += self.batch_size
        bucket = min(full, key=lambda b: self._piles[b][self.batch_size - 1])  # whichever was complete first
        batch, self._piles[bucket] = self._piles[bucket][: self.batch_size], self._piles[bucket][self.batch_size :]
        return bucket, self.stream.samples(np.asarray(batch))

    def _buckets(self, positions: np.ndarray) -> np.ndarray:
        samples = self.stream.samples(positions)
        buckets = np.zeros(len(samples), np.int64)
        for source, table in enumerate(self.bucket_of):
            mine = samples[:, 0] == source
            if table is not None and mine.any():
                buckets[mine] = table[samples[mine, 1]]
        return buckets

    def state(self) -> dict[str, Any]:
        waiting = sorted(position for pile in self._piles.values() for position in pile)
        return {"records": list(self.stream.lengths), "next": self._next, "waiting": waiting}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to a saved state.

        Raises:
          UserError: it was saved with other data, whose order would be another.
        """
        if list(state["records"]) != list(self.stream.lengths):
            raise UserError(
                f"the sources have {list(self.stream.lengths)} records, and had {list(state['records'])} when this run "
                "was saved; restore them (a missing shard counts), or use another --workdir"
            )
        self._next, self._piles = state["next"], {}
        waiting = np.asarray(state["waiting"], np.int64)
        for bucket, position in zip(self._buckets(waiting).tolist(), waiting.tolist(), strict=True):
            self._piles.setdefault(bucket, []).append(position)
