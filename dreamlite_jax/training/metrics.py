"""What a run tells of itself: `metrics.jsonl` with one line a step, TensorBoard, and the progress line."""

import json
import math
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import jax

from dreamlite_jax.training.errors import NonFiniteError


class Metrics:
    """Collects device scalars without waiting for them, and writes them in batches.

    On resume the lines after the restored step are dropped, so that each step stands in the file once.
    """

    def __init__(self, workdir: Path, restored_step: int):
        self._path = workdir / "metrics.jsonl"
        _truncate(self._path, restored_step)
        self._file = self._path.open("a")
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self._tensorboard = _tensorboard(workdir, restored_step)

    def add(self, step: int, values: dict[str, jax.Array]) -> None:
        """Values of `step` (the number of steps taken), still on the device."""
        self._pending.append((step, values))

    def flush(self) -> dict[str, float]:
        """Writes all that is pending; returns the means.

        Raises:
          NonFiniteError: a loss or gradient norm is not finite; lines up to that step are written first.
        """
        rows = [(step, {k: float(v) for k, v in values.items()}) for step, values in jax.device_get(self._pending)]
        self._pending.clear()
        for step, row in rows:
            self._file.write(json.dumps({"step": step, **row}) + "\n")
            if not math.isfinite(row["loss"]) or not math.isfinite(row["grad_norm"]):
                self._file.flush()
                raise NonFiniteError(step, row["loss"], row["grad_norm"])
        self._file.flush()
        if not rows:
            return {}
        means = {key: sum(row[key] for _, row in rows) / len(rows) for key in rows[0][1]}
        for key, value in means.items():
            self._tensorboard.add_scalar(f"train/{key}", value, rows[-1][0])
        return means

    def add_image(self, name: str, image: Any, step: int) -> None:
        """(H, W, 3) uint8 to TensorBoard."""
        self._tensorboard.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()


def _truncate(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line that a kill cut short
        if row["step"] <= step:
            kept.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)


def _tensorboard(workdir: Path, step: int) -> Any:
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1, flush_secs=30)


class Clock:
    """Where the time goes: training, compiling, pauses (checkpoints, grids). Survives restarts through `state`."""

    def __init__(self):
        self.train = self.compile = self.pause = 0.0
        self._recent: deque[tuple[float, int]] = deque(maxlen=8)
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

    def trained(self, steps: int) -> None:
        """Ends a lap of `steps` training steps."""
        seconds = self.lap()
        self.train += seconds
        self._recent.append((seconds, steps))

    def paused(self) -> None:
        self.pause += self.lap()

    def compiled(self) -> None:
        self.compile += self.lap()

    def sec_per_step(self) -> float:
        steps = sum(n for _, n in self._recent)
        return sum(s for s, _ in self._recent) / steps if steps else 0.0

    def progress(self, step: int, steps: int, batch_size: int, means: dict[str, float]) -> None:
        """Prints one line with the loss, the pace, the time left and the time lost."""
        pace = self.sec_per_step()
        rate = batch_size / pace if pace else 0.0
        print(
            f"step {step}/{steps}  loss {means.get('loss', float('nan')):.4f}  grad {means.get('grad_norm', 0):.2f}  "
            f"{pace:.3f} s/step  {rate:.1f} img/s ({rate / jax.device_count():.1f} a chip)  "
            f"ETA {duration(pace * (steps - step))}  compile {duration(self.compile)}  paused {duration(self.pause)}",
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
