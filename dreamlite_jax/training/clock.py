"""Where the time of a run goes, and the progress line."""

import contextlib
import sys
import time
from collections import deque
from collections.abc import Iterator

import jax

from dreamlite_jax.training import flops


class Clock:
    """Training, compiling and pauses (checkpoints, grids) in seconds. Survives restarts through `state`."""

    def __init__(self):
        self.train = self.compile = self.pause = 0.0
        self._recent: deque[tuple[float, int, float]] = deque(maxlen=8)  # seconds, steps, FLOPs of a lap
        self._started = time.monotonic()

    def state(self) -> dict[str, float]:
        return {"train": self.train, "compile": self.compile, "pause": self.pause}

    def restore(self, state: dict[str, float]) -> None:
        self.train, self.compile, self.pause = state["train"], state["compile"], state["pause"]

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.monotonic()
        seconds, self._started = now - self._started, now
        return seconds

    def trained(self, steps: int, work: float = 0.0) -> None:
        """Ends a lap of `steps` training steps that took `work` FLOPs, 0 if nobody counted them."""
        seconds = self.lap()
        self.train += seconds
        self._recent.append((seconds, steps, work))

    def started(self) -> None:
        """Ends what comes before the first step, which counts as a pause."""
        self.pause += self.lap()

    @contextlib.contextmanager
    def pausing(self) -> Iterator[None]:
        """Time inside counts as a pause, but for what compiles there; none of it counts as what goes on around it."""
        begun, compiled = time.monotonic(), self.compile
        try:
            yield
        finally:
            seconds = time.monotonic() - begun - (self.compile - compiled)
            self.pause += seconds
            self._started += seconds

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Time inside counts as compiling, not as what goes on around it."""
        begun = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - begun
            self.compile += seconds
            self._started += seconds

    def sec_per_step(self) -> float:
        steps = sum(n for _, n, _ in self._recent)
        return sum(s for s, _, _ in self._recent) / steps if steps else 0.0

    def utilisation(self) -> float | None:
        """Share of what the devices could do at most (MFU); None if that, or the work, is not known."""
        most = flops.peak(jax.devices()[0].device_kind)
        seconds, work = (sum(lap[i] for lap in self._recent) for i in (0, 2))
        return work / (seconds * most * jax.device_count()) if most and seconds and work else None

    def pace(self, batch_size: int) -> dict[str, float]:
        """What is worth plotting: sec_per_step, images_per_sec_per_chip and, where it is known, mfu."""
        seconds, share = self.sec_per_step(), self.utilisation()
        rate = batch_size / seconds / jax.device_count() if seconds else 0.0
        known = {} if share is None else {"mfu": share}
        return {"sec_per_step": seconds, "images_per_sec_per_chip": rate, **known}

    def progress(self, step: int, steps: int, batch_size: int, means: dict[str, float]) -> None:
        """Prints one line with the loss, the pace, the time left and the time lost."""
        pace = self.pace(batch_size)
        seconds, rate = pace["sec_per_step"], pace["images_per_sec_per_chip"]
        share = f"MFU {pace['mfu']:.1%}  " if "mfu" in pace else ""
        print(
            f"step {step}/{steps}  loss {means.get('loss', float('nan')):.4f}  grad {means.get('grad_norm', 0):.2f}  "
            f"{seconds:.3f} s/step  {rate * jax.device_count():.1f} img/s ({rate:.1f} a chip)  {share}"
            f"ETA {duration(seconds * (steps - step))}  compile {duration(self.compile)}  "
            f"paused {duration(self.pause)}",
            file=sys.stderr,
            flush=True,
        )


def duration(seconds: float) -> str:
    """12s, 3m05s or 2h07m."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
