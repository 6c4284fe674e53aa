"""What a run tells of itself: `metrics.jsonl` with one line a step, and TensorBoard."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from dreamlite_jax.training.errors import CollapseError, NonFiniteError


class Metrics:
    """Collects device scalars without waiting for them, and writes them in batches.

    On resume the lines after the restored step are dropped, so that each step stands in the file once. Where several
    processes run, one of them writes and all of them look at the values.
    """

    def __init__(
        self, workdir: Path, restored_step: int, *, write: bool = True,
        limits: Mapping[str, tuple[float, float]] | None = None,
    ):  # fmt: skip
        """`limits` are the least and the most of some metrics; a run that leaves them has collapsed."""
        self._limits = limits or {}
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self._file = self._tensorboard = None
        if write:
            path = workdir / "metrics.jsonl"
            _truncate(path, restored_step)
            self._file = path.open("a")
            self._tensorboard = _tensorboard(workdir, restored_step)

    def add(self, step: int, values: dict[str, jax.Array]) -> None:
        """Values of `step` (the number of steps taken), still on the device."""
        self._pending.append((step, values))

    def flush(self) -> dict[str, float]:
        """Writes all that is pending; returns the means.

        Raises:
          NonFiniteError: a loss or a norm is not finite; lines up to that step are written first.
          CollapseError: a metric is outside its limits; likewise.
        """
        rows = [(step, {k: float(v) for k, v in values.items()}) for step, values in jax.device_get(self._pending)]
        self._pending.clear()
        for step, row in rows:
            self._write(json.dumps({"step": step, **row}) + "\n")
            if bad := {k: v for k, v in row.items() if k.endswith(("loss", "norm")) and not math.isfinite(v)}:
                self._sync()
                raise NonFiniteError(step, bad)
            for name, (least, most) in self._limits.items():
                if not least <= row[name] <= most:
                    self._sync()
                    raise CollapseError(step, name, row[name], least, most)
        self._sync()
        if not rows:
            return {}
        means = {key: sum(row[key] for _, row in rows) / len(rows) for key in rows[0][1]}
        self.add_scalars(means, rows[-1][0])
        return means

    def add_scalars(self, values: dict[str, float], step: int) -> None:
        """To TensorBoard alone: what differs from run to run, such as the pace, is no business of metrics.jsonl."""
        if self._tensorboard:
            for key, value in values.items():
                self._tensorboard.add_scalar(f"train/{key}", value, step)

    def add_image(self, name: str, image: Any, step: int) -> None:
        """(H, W, 3) uint8 to TensorBoard."""
        if self._tensorboard:
            self._tensorboard.add_image(name, image, step, dataformats="HWC")

    def _write(self, line: str) -> None:
        if self._file:
            self._file.write(line)

    def _sync(self) -> None:
        if self._file:
            self._file.flush()
            os.fsync(self._file.fileno())  # a machine that vanishes takes no line of a saved step with it

    def close(self) -> None:
        if self._file:
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
