"""The one training loop. A stage gives it a state, a step, data, grids and an export; the loop does the rest."""

import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import grain
import jax
import numpy as np
from PIL import Image

from dreamlite_jax.config import to_dict
from dreamlite_jax.errors import UserError
from dreamlite_jax.training import sharding
from dreamlite_jax.training.checkpoint import Checkpoints
from dreamlite_jax.training.config import TrainConfig
from dreamlite_jax.training.metrics import Clock, Metrics, duration


@runtime_checkable
class Stage(Protocol):
    """What a kind of training is to the loop."""

    def init_state(self, key: jax.Array) -> Any:
        """State to start from: a `flax.struct` dataclass with at least `params`, `ema` and `step` (steps taken, int32).

        Its other fields are the stage's own: optimiser states, further networks. The loop places every array by
        `sharding.state_sharding`, saves the whole object and restores it. It is traced for its shapes too.
        """

    def step(self, state: Any, batch: dict[str, jax.Array]) -> tuple[Any, dict[str, jax.Array]]:
        """(next state, metrics) from a global batch; pure, compiled by the loop, which donates `state`.

        All that is random comes from `fold_in(key(config.seed), state.step)`. Metrics are scalars; "loss" and
        "grad_norm" are among them, and neither may ever be other than finite.
        """

    def dataset(self) -> grain.IterDataset:
        """Endless batches of this host, as dicts of numpy arrays; its iterator can be saved and restored."""

    def grid(self, params: Any) -> np.ndarray:
        """Labelled picture of fixed items, (H, W, 3) uint8."""

    def export(self, params: Any, directory: Path, provenance: dict[str, Any]) -> None:
        """Writes what the stage is for, with the averaged parameters."""


def train(config: TrainConfig, stage: Stage, workdir: Path) -> Path:
    """Trains to `config.steps` and exports; run again it goes on from the last checkpoint, or says that it is done.

    Returns:
      The exported artefact, `workdir/model`.
    """
    export = workdir / "model"
    if export.exists():
        print(f"{export} exists: this run is complete", file=sys.stderr)
        return export
    clock = Clock()
    config_record = to_dict(config)

    # 0. What can be wrong with a run to go on with is said before any device work.
    checkpoints = Checkpoints(workdir, config.keep_checkpoints)
    start = checkpoints.latest_step() or 0
    if start > config.steps:
        raise UserError(
            f"config.steps is {config.steps}, but {workdir} has trained {start} steps; use another --workdir"
        )
    if start:
        clock.restore(checkpoints.meta(start, config_record["model"])["clock"])

    # 1. Devices and state. Shapes first, so that parameters are born where they belong.
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        key = jax.random.key(config.seed)
        shapes = jax.eval_shape(stage.init_state, key)
        placement = sharding.state_sharding(mesh, shapes)
        count = _count(shapes.params) / 1e6
        print(f"{config.stage}: {count:.2f} M parameters on {mesh.devices.size} device(s)", file=sys.stderr)

        # 2. Resume. In this order: state, iterator, then the metrics file is cut back to the restored step.
        iterator = iter(stage.dataset())
        if start:
            state = checkpoints.restore(start, shapes, placement, iterator)
            print(f"resumed from step {start}", file=sys.stderr)
        else:
            state = jax.device_put(stage.init_state(key), placement)
        metrics = Metrics(workdir, start)

        # 3. The step, compiled before the first batch so that its time is known.
        batch_sharding = sharding.batch_sharding(mesh)
        jitted = jax.jit(stage.step, donate_argnums=0, out_shardings=(placement, sharding.replicated(mesh)))
        clock.paused()
        batch = sharding.global_batch(next(iterator), batch_sharding) if start < config.steps else None
        if batch is not None:
            jitted = jitted.lower(state, batch).compile()
        clock.compiled()

        # 4. Steps. Nothing below waits for the device except every `log_every` steps.
        last_logged = start
        for step in range(start + 1, config.steps + 1):
            state, values = jitted(state, batch)
            metrics.add(step, values)
            saving = step % config.checkpoint_every == 0 or step == config.steps
            position = iterator.get_state() if saving else None  # before the next batch is taken
            if step < config.steps:
                batch = sharding.global_batch(next(iterator), batch_sharding)
            logging = step % config.log_every == 0 or step == config.steps
            if logging or saving:
                means = metrics.flush()
                if logging:
                    clock.trained(step - last_logged)
                    last_logged = step
                    clock.progress(step, config.steps, config.data.batch_size, means)
            if saving:
                meta = {"model": config_record["model"], "config": config_record, "clock": clock.state()}
                checkpoints.save(step, state, position, meta)
                if logging:
                    clock.paused()
            if step % config.grid_every == 0 or step == config.steps:
                save_grid(stage.grid(state.ema), workdir, step, metrics)
                if logging:
                    clock.paused()

        # 5. Export the averaged parameters.
        checkpoints.wait()
        provenance = {
            "config": config_record,
            "steps": config.steps,
            "clock": clock.state(),
            "written": time.strftime("%F"),
        }
        stage.export(jax.device_get(state.ema), export, provenance)
        checkpoints.close()
        metrics.close()
    seconds = clock.state()
    print(
        f"done: {config.steps} steps, trained {duration(seconds['train'])}, compiled {duration(seconds['compile'])}, "
        f"paused {duration(seconds['pause'])}; model in {export}",
        file=sys.stderr,
    )
    return export


def save_grid(picture: np.ndarray, workdir: Path, step: int, metrics: Metrics) -> None:
    """`workdir/grids/step_N.png`, and TensorBoard."""
    directory = workdir / "grids"
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / f"step_{step:06d}.png"
    temporary = target.with_suffix(".tmp")
    Image.fromarray(picture).save(temporary, format="png")
    os.replace(temporary, target)
    metrics.add_image("samples", picture, step)


def _count(params: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


def check(config: TrainConfig, stage: Stage) -> list[str]:
    """Builds everything but runs no step: parameters by shape, one real batch, the step's shapes. Says what it saw."""
    state = jax.eval_shape(stage.init_state, jax.random.key(config.seed))
    batch = next(iter(stage.dataset()))
    _, values = jax.eval_shape(stage.step, state, batch)
    shapes = ", ".join(f"{name} {tuple(np.shape(value))}" for name, value in batch.items())
    return [
        f"config: stage {config.stage}, {config.steps} steps, batch {config.data.batch_size}",
        f"parameters: {_count(state.params):,}",
        f"batch: {shapes}",
        f"metrics: {', '.join(values)}",
    ]
