"""Says within seconds whether a run can start here: one line a check, before the bill.

    python launch/preflight.py --config configs/dreamlite.py:t2i_256 --workdir /gcs/runs/t2i_256 [--config.FIELD=VALUE]

Takes the arguments of `python -m dreamlite_jax.train`, and on a pod runs on every host (launch/tpu_vm.sh preflight).
The config builds, the workdir can be written and renamed in, the devices fill the mesh, the data are what the config
says, one batch comes, and one step of it runs on the devices with finite numbers. Nothing is kept but the compiled step
where JAX_COMPILATION_CACHE_DIR is set: training then starts without compiling it again.

Exit codes: 0 all is well; 1 a check failed, and those after it that need it were left out; 2 bad arguments.
"""

import argparse
import math
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dreamlite_jax import cli
from dreamlite_jax.errors import UserError
from dreamlite_jax.train import PROBE, check_workdir, parse
from dreamlite_jax.training.config import TrainConfig


class Checks:
    """Runs checks in order, each printing one line; a check whose needs failed is left out."""

    def __init__(self):
        self.results: dict[str, Any] = {}
        self.failed = False

    def run(self, name: str, check: Callable[..., tuple[str, Any]], *needs: str) -> None:
        """`check` takes the results of `needs`, and returns what to say and its own result."""
        if missing := [need for need in needs if need not in self.results]:
            print(f"left out  {name}: needs {missing[0]}", flush=True)
            return
        started = time.monotonic()
        try:
            said, self.results[name] = check(*(self.results[need] for need in needs))
            verdict = "ok"
        except Exception as error:  # every way of failing is a line here, with its kind if it is none of ours
            said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            said = said if isinstance(error, UserError) else f"{type(error).__name__}: {said}"
            verdict, self.failed = "FAILED", True
        print(f"{verdict:<9} {name}: {said} ({time.monotonic() - started:.1f} s)", flush=True)


def devices(config: TrainConfig) -> tuple[str, Any]:
    """The mesh over all devices of the run."""
    import jax

    from dreamlite_jax.parallel import sharding
    from dreamlite_jax.training.loop import check_batch, describe

    mesh = sharding.make_mesh(config.mesh)
    check_batch(config, mesh.size)
    rows = config.data.batch_size // mesh.size // config.accumulate
    kind = jax.devices()[0].device_kind
    return f"{kind}: {describe(mesh)}, {rows} rows a device and part", mesh


def storage(workdir: Path) -> tuple[str, None]:
    """Writes a file in a new folder, renames the folder as checkpoints are, reads it back, and removes it.

    All hosts of a pod do so at once; each has a folder of its own, in the workdir or where it will be made.
    """
    check_workdir(workdir)
    workdir = workdir.absolute()
    place = next(path for path in (workdir, *workdir.parents) if path.exists())
    name = f"{PROBE}{uuid.uuid4().hex}"
    before, after = place / f"{name}.tmp", place / name
    content = os.urandom(2**20)
    try:
        before.mkdir()
        (before / "file").write_bytes(content)
        os.rename(before, after)
        if (after / "file").read_bytes() != content:
            raise UserError(f"--workdir {workdir} gives back other bytes than were written")
    finally:
        shutil.rmtree(before, ignore_errors=True)
        shutil.rmtree(after, ignore_errors=True)
    return f"{place} can be written and renamed in", None


def data(config: TrainConfig) -> tuple[str, Any]:
    """The stage, built: it looks at every source and compares it with the config."""
    from dreamlite_jax.training.build import build

    run = build(config)
    sources = (*config.data.sources, *config.data.validation)
    return f"{len(sources)} source(s) are what the config says", run


def batch(run: Any) -> tuple[str, Any]:
    """The first batch of this host."""
    import numpy as np

    values = next(iter(run.feed.dataset(run.stage.fields)))
    bad = [name for name, value in values.items() if value.dtype.kind == "f" and not np.isfinite(value).all()]
    if bad:
        raise UserError(f"{', '.join(bad)} of the first batch are not finite; the source was made badly")
    return ", ".join(f"{name} {tuple(value.shape)}" for name, value in values.items()), values


def step(config: TrainConfig, mesh: Any, run: Any, values: dict[str, Any]) -> tuple[str, None]:
    """One step from a fresh state, compiled as the loop compiles it."""
    import jax

    from dreamlite_jax.parallel import sharding

    with jax.set_mesh(mesh):
        placement = sharding.state_sharding(mesh, run.stage.state_shapes())
        state = sharding.place(run.stage.init_state(), placement)
        jitted = jax.jit(run.stage.step, donate_argnums=0, out_shardings=(placement, sharding.replicated(mesh)))
        rows = sharding.global_batch(values, sharding.batch_sharding(mesh))
        started = time.monotonic()
        compiled = jitted.lower(state, rows).compile()
        compiled_sec = time.monotonic() - started
        _, metrics = compiled(state, rows)
        found = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if bad := [name for name in ("loss", "grad_norm") if not math.isfinite(found[name])]:
        raise UserError(f"{bad[0]} of the first step is {found[bad[0]]}")
    memory = mesh.local_devices[0].memory_stats() or {}
    used = f", {memory['peak_bytes_in_use'] / 2**30:.1f} GiB at most" if "peak_bytes_in_use" in memory else ""
    return (
        f"loss {found['loss']:.4f}, gradient norm {found['grad_norm']:.3f}, compiled in {compiled_sec:.0f} s{used}",
        None,
    )


def preflight(args: argparse.Namespace, config: TrainConfig) -> int:
    """All checks; the exit code."""
    checks = Checks()
    checks.run(
        "config", lambda: (f"stage {config.stage}, {config.steps} steps, batch {config.data.batch_size}", config)
    )
    checks.run("storage", lambda: storage(args.workdir))
    checks.run("devices", devices, "config")
    checks.run("data", data, "config")
    checks.run("batch", batch, "data")
    checks.run("step", step, "config", "devices", "data", "batch")
    return int(checks.failed)


def main(argv: Sequence[str] | None = None) -> int:
    args, config = parse(sys.argv[1:] if argv is None else argv)
    from dreamlite_jax.parallel import distributed

    distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    return preflight(args, config)


if __name__ == "__main__":
    cli.run(main)
