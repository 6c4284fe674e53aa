"""The one training loop: a stage gives it a state and a step, a feed batches, a gallery grids and the export."""

import collections
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from PIL import Image

from dreamlite_jax.config import differences, to_dict
from dreamlite_jax.data import place
from dreamlite_jax.errors import UserError
from dreamlite_jax.parallel import distributed, sharding
from dreamlite_jax.training import optim
from dreamlite_jax.training.checkpoint import EXPORT, Checkpoints, check_resume, newest_record
from dreamlite_jax.training.clock import Clock, duration
from dreamlite_jax.training.config import TrainConfig
from dreamlite_jax.training.errors import NonFiniteError, Preempted
from dreamlite_jax.training.feed import Feed
from dreamlite_jax.training.gallery import Gallery
from dreamlite_jax.training.metrics import Metrics
from dreamlite_jax.training.stage import Stage, check_metrics
from dreamlite_jax.training.steps import Profile, Steps

SUPERSEDED = "superseded"  # folder of a workdir: models exported after fewer steps than the run has now
RUN_AHEAD = 3  # steps given to the device beyond the one that it has finished: their batches wait in its memory


def train(
    config: TrainConfig, stage: Stage, feed: Feed, gallery: Gallery, workdir: Path,
    check_claim: Callable[[], None] = lambda: None,
) -> Path:  # fmt: skip
    """Trains to `config.steps` and exports; run again it goes on from the last checkpoint, or says that it is done.

    A model that was exported after fewer steps moves to the workdir's `superseded`.

    Args:
      check_claim: raises where the workdir is no longer this run's (`training.claim`).

    Returns:
      The exported artefact, `workdir/model`.

    Raises:
      UserError: the config does not fit the devices or what is in `workdir`; before any device work.
      NonFiniteError: a loss or norm stopped being a number; the last good checkpoint stays.
      CollapseError: a metric left the stage's limits; likewise.
      SaveError: a checkpoint could not be written; those before it stay.
      Preempted: SIGTERM or a maintenance notice; the state is saved.
    """
    export = workdir / EXPORT
    config_record = to_dict(config)
    exported = check_resume(workdir, config_record)
    if exported == config.steps:
        say(f"{export} exists: this run is complete after {exported} steps")
        return export
    clock = Clock()

    # 0. What can be wrong with a run to go on with, or with the devices, is said before any device work.
    mesh = sharding.make_mesh(config.mesh)
    check_batch(config, mesh.devices.size)
    checkpoints = Checkpoints(workdir, config.keep_checkpoints)

    with jax.set_mesh(mesh), distributed.StopRequest() as stop:
        # 1. Shapes first, so that the state is born where it belongs.
        shapes = stage.state_shapes()
        placement = sharding.state_sharding(mesh, shapes)
        for line in optim.warnings(config):
            say(line)
        say(f"{config.stage}: {count(shapes.params) / 1e6:.2f} M parameters on {describe(mesh)}")

        # 2. Resume. In this order: state, iterator, then the metrics file is cut back to the restored step.
        iterator, start = iter(feed.dataset(stage.fields, workdir)), 0
        if restored := checkpoints.restore(shapes, placement):
            frozen = sharding.place(stage.load_frozen(), placement.frozen)
            checkpoints.check_frozen(restored, frozen)
            start, state = restored.step, restored.state.replace(frozen=frozen)
            iterator.set_state(place.upgraded(restored.position, restored.meta["config"]))
            clock.restore(restored.meta["clock"])
            say(f"resumed from step {start}")
            if changed := changed_settings(restored.meta["config"], config_record):
                say(f"settings that are others than in step {start}: {'; '.join(changed)}")
        else:
            state = sharding.place(stage.init_state(), placement)
        frozen = restored = None  # the state is donated; nothing else may hold it
        metrics = Metrics(workdir, start, write=distributed.primary(), limits=stage.limits)
        if exported is not None:
            supersede(export, exported, config.steps)

        # 3. The step is compiled when a batch of a new shape comes; the first is taken now, so that its time is known.
        steps = Steps(stage, placement, mesh, clock)
        clock.started()
        places = {start + 1: iterator.get_state()}  # in the data, of the batches whose steps are not known to be good
        batch = steps.place(next(iterator)) if start < config.steps else None
        if batch is not None:
            steps.compiled(state, batch)
        profile = Profile(workdir, start, config.steps, config.profile_steps)

        # 4. Steps. Nothing below waits for the device except every `log_every` steps, and to stay near it.
        last_logged, work, running = start, 0.0, collections.deque()
        for step in range(start + 1, config.steps + 1):
            profile.before(step)
            with jax.transfer_guard("disallow"):
                state, values = steps(state, batch)
            work += steps.flops(batch)
            metrics.add(step, values)
            running.append(values)
            profile.after(step, values)
            last, stopping = step == config.steps, stop.reached(step)
            saving = last or stopping or step % config.checkpoint_every == 0
            position = places[step + 1] = iterator.get_state()  # before the next batch is taken
            if not last and not stopping:
                batch = steps.place(next(iterator))
            if len(running) > RUN_AHEAD:
                jax.block_until_ready(running.popleft())
            logging = last or stopping or step % config.log_every == 0
            drawing = last or step % config.grid_every == 0
            if logging or saving or drawing:  # so that no pause holds the time of steps that are still under way
                check_claim()
                try:
                    means = metrics.flush()
                except ArithmeticError as error:  # what was good when saved may still be on its way to the disk
                    checkpoints.wait()
                    if isinstance(error, NonFiniteError):
                        batch = not_finite(iterator, places[error.step])
                        raise NonFiniteError(error.step, error.bad, batch) from None
                    raise
                places = {step + 1: position}
                checkpoints.look()
                if logging:
                    clock.trained(step - last_logged, work)
                    last_logged, work = step, 0.0
                    metrics.add_scalars(clock.pace(config.data.batch_size), step)
                    if distributed.primary():
                        clock.progress(step, config.steps, config.data.batch_size, means)
            if saving:
                with clock.pausing():
                    checkpoints.save(step, state, position, {"config": config_record, "clock": clock.state()})
            if stopping and not last:
                checkpoints.wait()
                checkpoints.close()
                metrics.close()
                raise Preempted(step)
            if drawing:
                with clock.pausing():
                    save_grid(gallery, state, workdir, step, metrics)

        # 5. Export the averaged parameters.
        checkpoints.wait()
        check_claim()
        provenance = {
            "config": config_record,
            "steps": config.steps,
            "clock": clock.state(),
            "written": time.strftime("%F"),
        }
        averaged = sharding.gather(state.ema, mesh)
        if distributed.primary():
            with jax.set_mesh(sharding.local_mesh()):
                gallery.export(jax.device_get(averaged), export, provenance)
        distributed.wait_for_all("export")
        checkpoints.close()
        metrics.close()
    seconds = clock.state()
    say(
        f"done: {config.steps} steps, trained {duration(seconds['train'])}, compiled {duration(seconds['compile'])}, "
        f"paused {duration(seconds['pause'])}; model in {export}"
    )
    return export


def not_finite(iterator: grain.DatasetIterator, position: Any) -> str:
    """What of the batch at this place in the data is not finite, in words; "" if all is. All processes must ask."""
    iterator.set_state(position)
    found = []
    for name, values in next(iterator).items():
        good = np.isfinite(np.asarray(values, np.float32)).reshape(len(values), -1).all(1)
        if not good.all():
            rows = np.flatnonzero(~good).tolist()
            found.append(f"{name} in {len(rows)} of {len(good)} rows ({', '.join(map(str, rows[:8]))})")
    if distributed.any_of_all(bool(found)) and not found:
        return "in the part of another process, which names it"
    return ", ".join(found)


def supersede(export: Path, exported: int, steps: int) -> None:
    """Moves a finished export of fewer steps out of the way; nothing of it is lost."""
    aside = export.parent / SUPERSEDED / f"{export.name}_{exported:06d}"
    say(f"{export} is of {exported} steps and config.steps is {steps}: it moves to {aside}, and the run goes on")
    distributed.wait_for_all(f"superseded {exported}")  # every process has read what it is
    if distributed.primary():
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(exist_ok=True)
        os.replace(export, aside)


def changed_settings(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What a resumed run takes that is other than what it had; those it may not take are errors before."""

    def told(path: str, stored: Any, wanted: Any) -> str:
        if isinstance(stored, list) and isinstance(wanted, list) and any(isinstance(x, dict) for x in stored):
            return f"{path} has {len(wanted)} entries, had {len(stored)}"
        return f"{path} is {wanted!r}, was {stored!r}"

    return [told(*found) for found in differences(before, now, "config") if found.stored is not None]


def check_batch(config: TrainConfig, devices: int) -> None:
    """Raises `UserError` unless every device of every process gets an equal part of each microbatch."""
    part = devices * config.accumulate
    if config.data.batch_size % part:
        near = max(1, round(config.data.batch_size / part)) * part
        raise UserError(
            f"config.data.batch_size {config.data.batch_size} is not a multiple of {devices} devices x "
            f"config.accumulate {config.accumulate}; {near} would be"
        )


def save_grid(gallery: Gallery, state: Any, workdir: Path, step: int, metrics: Metrics) -> None:
    """`workdir/grids/step_N.png`, and TensorBoard: drawn by one process, with parameters gathered from all of them."""
    averaged = sharding.gather(state.ema, jax.sharding.get_mesh())
    if distributed.primary():
        with jax.set_mesh(sharding.local_mesh()):
            picture = gallery.grid(averaged)
        directory = workdir / "grids"
        directory.mkdir(parents=True, exist_ok=True)
        target = directory / f"step_{step:06d}.png"
        temporary = target.with_suffix(".tmp")
        Image.fromarray(picture).save(temporary, format="png")
        os.replace(temporary, target)
        metrics.add_image("samples", picture, step)
    distributed.wait_for_all(f"grid {step}")


def count(params: Any) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return sum(x.size for x in jax.tree.leaves(params))


def describe(mesh: jax.sharding.Mesh) -> str:
    """The devices of a run in words."""
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{mesh.devices.size} device(s){processes}, data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']}"


def say(message: str) -> None:
    """One line on stderr, from one process."""
    if distributed.primary():
        print(message, file=sys.stderr, flush=True)


def check(config: TrainConfig, stage: Stage, feed: Feed, workdir: Path | None = None) -> list[str]:
    """Builds everything but runs no step: parameters by shape, one real batch, the step's shapes. Says what it saw.

    The devices need not be those of the run: a pod's config can be checked on a laptop.

    Args:
      workdir: what a run there would go on with is held to the config too.

    Raises:
      UserError: what a run would be refused for, as far as it shows without its devices and the arrays of files.
    """
    record, iterator = to_dict(config), iter(feed.dataset(stage.fields))
    exported = check_resume(workdir, record) if workdir else None
    saved = newest_record(workdir) if workdir else None
    begins = []
    if exported == config.steps:
        begins.append(f"workdir: complete after {exported} steps")
    elif saved:
        iterator.set_state(place.upgraded(saved.position, saved.meta["config"]))
        begins.append(
            "; ".join([f"workdir: goes on from step {saved.step}", *changed_settings(saved.meta["config"], record)])
        )
    for source in (*stage.frozen.values(), *(() if saved else stage.sources.values())):
        source.check()
    state = stage.state_shapes()
    batch = next(iterator)
    _, values = jax.eval_shape(stage.step, state, batch)
    check_metrics(stage, values)
    shapes = ", ".join(f"{name} {tuple(np.shape(value))}" for name, value in batch.items())
    return [
        f"config: stage {config.stage}, {config.steps} steps, batch {config.data.batch_size}",
        f"parameters: {count(state.params):,}",
        f"batch: {shapes}",
        f"metrics: {', '.join(values)}",
        *begins,
        *optim.warnings(config),
    ]
