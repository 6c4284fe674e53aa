"""A stage's step as the loop runs it: compiled once for each shape of batch, counted, and traced on demand."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dreamlite_jax.parallel import distributed, sharding
from dreamlite_jax.training.clock import Clock
from dreamlite_jax.training.stage import Stage, check_metrics

Batch = dict[str, jax.Array]
Signature = tuple[tuple[str, tuple[int, ...], str], ...]
SETTLED = 10  # steps of a start before a profile begins


class Steps:
    """(state, batch) -> (state, metrics), the state donated."""

    def __init__(self, stage: Stage, placement: Any, mesh: Mesh, clock: Clock):
        self._stage, self._clock = stage, clock
        self._batch = sharding.batch_sharding(mesh)
        out = (placement, sharding.replicated(mesh))
        self._jitted = jax.jit(stage.step, donate_argnums=0, out_shardings=out)
        self._programs: dict[Signature, Any] = {}
        self._flops: dict[Signature, float] = {}

    def place(self, batch: dict[str, np.ndarray]) -> Batch:
        """This process's rows of a batch on its devices, as part of the global batch."""
        return sharding.global_batch(batch, self._batch)

    def compiled(self, state: Any, batch: Batch) -> Any:
        """The program for batches of this shape. With aspect-ratio buckets there is one a bucket."""
        shape = signature(batch)
        if shape not in self._programs:
            with self._clock.compiling():
                lowered = self._jitted.lower(state, batch)
                check_metrics(self._stage, lowered.out_info[1])
                self._programs[shape] = lowered.compile()
                distributed.wait_for_all(f"compiled {len(self._programs)}")  # or the first waits in a collective
        return self._programs[shape]

    def __call__(self, state: Any, batch: Batch) -> tuple[Any, dict[str, jax.Array]]:
        return self.compiled(state, batch)(state, batch)

    def flops(self, batch: Batch) -> float:
        """Of one step on a batch of this shape; 0 if the stage does not count them."""
        shape = signature(batch)
        if shape not in self._flops:
            self._flops[shape] = self._stage.flops(batch)
        return self._flops[shape]


def signature(batch: Batch) -> Signature:
    return tuple((name, value.shape, str(value.dtype)) for name, value in sorted(batch.items()))


class Profile:
    """A trace of some steps for TensorBoard's profiler or xprof, in `workdir/profile`; one folder a start."""

    def __init__(self, workdir: Path, start: int, steps: int, length: int):
        self._directory = workdir / "profile"
        first = start + SETTLED + 1
        self._first = first if first + length <= steps + 1 else start + 1
        self._last = min(self._first + length - 1, steps)
        self.running = False

    def before(self, step: int) -> None:
        if step == self._first <= self._last:
            jax.profiler.start_trace(str(self._directory))
            self.running = True

    def after(self, step: int, values: Any) -> None:
        if self.running and step == self._last:
            jax.block_until_ready(values)
            jax.profiler.stop_trace()
            self.running = False
