"""Whole checkpoints through orbax: state, data iterator, clock and config as one object, written in the background.

Order of resuming: the newest checkpoint that is whole by its own fingerprint, then the data iterator, then the metrics
file, cut back to that step. A damaged checkpoint is set aside with a message, never used and never silently replaced;
what the machine or the storage is at fault for is raised, and moves nothing.
"""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from dreamlite_jax.config import differences, with_text_state
from dreamlite_jax.errors import UserError
from dreamlite_jax.model_folder import MANIFEST, load_provenance, vae_manifest, weight_file
from dreamlite_jax.parallel import distributed
from dreamlite_jax.training.errors import SaveError, short
from dreamlite_jax.training.fingerprint import fingerprint
from dreamlite_jax.training.state import TrainState, from_saved, saved

FOLDER, DAMAGED, EXPORT = "checkpoints", "damaged", "model"  # in a workdir
ARCHITECTURE = ("unet", "vae", "text")  # of `config.model`; the rest are settings, which may change between starts
PASSING = (  # how messages of storage and devices begin that say nothing of what is in the files
    "ABORTED", "CANCELLED", "DEADLINE_EXCEEDED", "INTERNAL", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED",
    "UNAUTHENTICATED", "UNAVAILABLE", "UNKNOWN",
)  # fmt: skip


class Restored(NamedTuple):
    """A state without what is frozen, the data iterator's state and what `save` was told of the run."""

    step: int
    state: TrainState
    position: dict[str, Any]
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints of one workdir; with several processes, of all of them together.

    A step's folder gets its final name only when complete, so a process killed during a save leaves the one before.
    """

    def __init__(self, workdir: Path, keep: int):
        self.workdir = workdir.absolute()
        self.directory = self.workdir / FOLDER
        self._last = 0  # the step of the last save that was started
        self._frozen: dict[str, int] | None = None  # the fingerprint of what is frozen, once it is known
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, create=True, enable_async_checkpointing=True, cleanup_tmp_directories=True
            ),
        )

    def steps(self) -> list[int]:
        """Steps with a folder, newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def save(self, step: int, state: TrainState, position: dict[str, Any], meta: dict[str, Any]) -> None:
        """Starts a save; the arrays are copied off the device before it returns.

        `position` is the data iterator's state: the same on every host, so it is one small JSON beside the arrays.

        Raises:
          SaveError: this save could not be started, or the one before did not end well.
        """
        if step in self._manager.all_steps():
            return
        parts, still = saved(state), self._fingerprint_of(state.frozen)
        meta = {**meta, "layout": layout(parts), "fingerprint": fingerprint(parts) | still}
        with self._saving():
            self._manager.wait_until_finished()
            self._confirm()
            self._last = step
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(parts), data=ocp.args.JsonSave(position), meta=ocp.args.JsonSave(meta)
                ),
            )

    def _fingerprint_of(self, frozen: dict[str, Any]) -> dict[str, int]:
        if self._frozen is None:
            self._frozen = fingerprint(frozen)
        return self._frozen

    def check_frozen(self, restored: Restored, frozen: dict[str, Any]) -> None:
        """Raises `UserError` where what never changes is not what the run that saved a state had."""
        before = restored.meta["fingerprint"]
        if other := [name for name, found in self._fingerprint_of(frozen).items() if before.get(name, found) != found]:
            raise UserError(
                f"{self.directory} was trained beside other weights as {other[0]} than those that the config names "
                "now; put them back, or use another --workdir"
            )

    def restore(self, shapes: TrainState, placement: TrainState) -> Restored | None:
        """The newest whole checkpoint, its state placed by `placement`'s shardings; None where there is none.

        Damaged ones are moved to the workdir's folder `damaged`, with a message on stderr.

        Raises:
          UserError: there are checkpoints or were, and not one of them is whole; or they have other arrays than these
            shapes.
          Exception: anything that is no damage, such as storage that does not answer.
        """
        wanted = layout(saved(shapes))
        target = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), saved(shapes), saved(placement)
        )
        elsewhere = {"frozen", *shapes.frozen}  # earlier versions of this code saved it too
        for step in self.steps():
            try:
                restored = self._restore(step, target, wanted, elsewhere)
            except Exception as error:
                if not is_damage(error):
                    raise
                self._set_aside(step, error)
            else:
                self._last = step
                return restored
        if damaged := sorted(path.name for path in (self.workdir / DAMAGED).glob("*")):
            raise UserError(
                f"{self.workdir} has no checkpoint that is whole; damaged ones are in {self.workdir / DAMAGED}: "
                f"{', '.join(damaged)}. Use another --workdir to begin anew"
            )
        return None

    def _restore(self, step: int, target: Any, wanted: dict[str, str], elsewhere: set[str]) -> Restored:
        found = _meta(self._manager, step).get("layout")
        if found is None:
            raise UserError(f"{self.directory} was written by an earlier version of this code; use another --workdir")
        names = (found.keys() | wanted.keys()) - elsewhere
        if other := [name for name in names if found.get(name) != wanted.get(name)]:
            raise UserError(
                f"{self.directory} holds a checkpoint whose {min(other)} has other arrays than this config makes; "
                "use the config it was started with, or another --workdir"
            )
        parts = ocp.args.Composite(state=_restore_of(target), data=ocp.args.JsonRestore(), meta=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=parts)
        state, meta = restored["state"], restored["meta"]
        _verify({name: meta["fingerprint"][name] for name in wanted}, state)
        return Restored(step, from_saved(state), restored["data"], meta)

    def _set_aside(self, step: int, error: Exception) -> None:
        distributed.wait_for_all(f"damaged {step}")
        if distributed.primary():
            print(
                f"the checkpoint of step {step} is damaged ({short(error)}): it is moved to {self.workdir / DAMAGED}, "
                "and the one before is used",
                file=sys.stderr,
            )
            (self.workdir / DAMAGED).mkdir(exist_ok=True)
            place = self.workdir / DAMAGED / f"step_{step}"
            shutil.rmtree(place, ignore_errors=True)  # of an earlier attempt at the same step
            os.replace(self.directory / str(step), place)
        distributed.wait_for_all(f"set aside {step}")
        self._manager.reload()

    def look(self) -> None:
        """Raises `SaveError` if a save in the background has failed; waits for nothing."""
        with self._saving():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Returns when the last save is whole on disk; raises `SaveError` if it is not."""
        with self._saving():
            self._manager.wait_until_finished()
            self._confirm()

    def _confirm(self) -> None:
        if self._last and distributed.primary() and self._last not in steps_in(self.workdir):
            raise FileNotFoundError(f"{self.directory / str(self._last)} did not appear")

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            whole = [step for step in steps_in(self.workdir) if step != self._last]
            raise SaveError(self._last, max(whole, default=None), error) from error

    def close(self) -> None:
        self._manager.close()


def is_damage(error: Exception) -> bool:
    """Whether a checkpoint that raised this is at fault; a damaged file can fail in any way but those of a machine."""
    if error.__cause__ is not None and not is_damage(error.__cause__):
        return False
    if isinstance(error, OSError):
        return isinstance(error, FileNotFoundError)
    refused = [int(code) for code in re.findall(r"os_error_code='(\d+)'", str(error))]  # of TensorStore's ValueErrors
    return not (
        isinstance(error, UserError | MemoryError | jax.errors.JaxRuntimeError)
        or str(error).startswith(PASSING)
        or any(code != errno.ENOENT for code in refused)
    )


def check_resume(workdir: Path, config: dict[str, Any]) -> int | None:
    """Looks whether this config can go on from what is in a workdir; touches no device, and no file.

    Returns:
      After how many steps the model in the workdir was exported; None where there is none.

    Raises:
      UserError: the checkpoints are of another architecture or stage, or the run has trained more steps than the
        config's; or it is complete after fewer, and there is no checkpoint to go on from.
    """
    if saved := newest_record(workdir):
        _compare(workdir, saved.step, saved.meta["config"], config)
    exported = exported_steps(workdir)
    if exported is None or exported == config["steps"]:
        return exported
    there = f"config.steps is {config['steps']}, but the run in {workdir} is complete after {exported}"
    if exported > config["steps"]:
        raise UserError(f"{there}; use another --workdir")
    if not steps_in(workdir):
        raise UserError(
            f"{there}, and no checkpoint is left to go on from; use another --workdir (config.init_from can name this "
            "one)"
        )
    return exported


class Record(NamedTuple):
    """A checkpoint without its arrays: see `Restored`."""

    step: int
    position: dict[str, Any]
    meta: dict[str, Any]


def newest_record(workdir: Path) -> Record | None:
    """Of the newest checkpoint whose record can be read, None if there is none; touches no device."""
    for step in reversed(steps_in(workdir)):
        parts = ocp.args.Composite(data=ocp.args.JsonRestore(), meta=ocp.args.JsonRestore())
        try:
            with _reader(workdir) as manager:
                restored = manager.restore(step, args=parts)
            return Record(step, restored["data"], restored["meta"])
        except Exception:  # whatever is wrong with it, `restore` says so
            continue
    return None


def exported_steps(workdir: Path) -> int | None:
    """After how many steps a workdir's model was exported, by its own record, else by the newest checkpoint.

    Raises:
      UserError: there is a model of which neither says it.
    """
    export = workdir / EXPORT
    if not export.exists():
        return None
    if (export / MANIFEST).is_file():
        steps = load_provenance(export).get("steps")
    elif (file := export / weight_file("vae")).is_file():
        steps = vae_manifest(file)["provenance"].get("steps")
    else:
        steps = None
    if steps is None:
        steps = max(steps_in(workdir), default=None)
    if steps is None:
        raise UserError(
            f"{export} does not say after how many steps it was exported, and {workdir} has no checkpoint that would; "
            "use another --workdir"
        )
    return steps


def _compare(workdir: Path, step: int, stored: dict[str, Any], config: dict[str, Any]) -> None:
    model = with_text_state(stored["model"])
    for part in ARCHITECTURE:
        if found := differences(model[part], config["model"][part], f"config.model.{part}"):
            raise UserError(
                f"{workdir} holds a checkpoint of another architecture: {'; '.join(map(str, found))}; use another "
                "--workdir, or the config it was started with"
            )
    if stored["stage"] != config["stage"]:
        raise UserError(
            f"{workdir} holds checkpoints of stage {stored['stage']}, and config.stage is {config['stage']}; use "
            "another --workdir (config.init_from can name this one)"
        )
    if step > config["steps"]:
        raise UserError(
            f"config.steps is {config['steps']}, but {workdir} has trained {step} steps; use another --workdir"
        )


def saved_config(workdir: Path) -> dict[str, Any]:
    """The whole config, as a mapping, of the run that saved a workdir's newest checkpoint."""
    with _newest(workdir) as (manager, step):
        return _meta(manager, step)["config"]


def averaged(workdir: Path, shapes: Any) -> Any:
    """Averaged parameters, on the host, of a workdir's newest checkpoint, whatever its stage and mesh were.

    Raises:
      UserError: no checkpoint, one of other parameters than these shapes, or a damaged one.
    """
    whole = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    item = {"ema": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes)}
    with _newest(workdir) as (manager, step):
        parts = manager.restore(step, args=ocp.args.Composite(state=_restore_of(item), meta=ocp.args.JsonRestore()))
        _verify({"ema": parts["meta"]["fingerprint"]["ema"]}, {"ema": parts["state"]["ema"]})
    return jax.device_get(parts["state"]["ema"])


def _restore_of(target: Any) -> ocp.args.PyTreeRestore:
    """Of a saved tree, these arrays alone."""
    arguments = ocp.checkpoint_utils.construct_restore_args(target)
    return ocp.args.PyTreeRestore(target, restore_args=arguments, partial_restore=True)


@contextlib.contextmanager
def _newest(workdir: Path) -> Iterator[tuple[ocp.CheckpointManager, int]]:
    """A workdir's checkpoints to read, and the newest step; what goes wrong inside is a `UserError`."""
    if not (steps := steps_in(workdir)):
        raise UserError(f"{workdir} has no checkpoint")
    with _reader(workdir) as manager:
        try:
            yield manager, steps[-1]
        except Exception as error:
            raise UserError(
                f"the checkpoint of step {steps[-1]} in {workdir} cannot be used ({short(error)}); name a model "
                "folder, or resume that run, which finds the last whole checkpoint"
            ) from error


def _reader(workdir: Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(read_only=True)
    return ocp.CheckpointManager((workdir / FOLDER).absolute(), options=options)


def _meta(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """What `save` was told of the run at `step`; touches no device."""
    return manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]


def steps_in(workdir: Path) -> list[int]:
    """Steps of the complete saves in a workdir."""
    folder = workdir / FOLDER
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.is_dir() else []


def layout(parts: dict[str, Any]) -> dict[str, str]:
    """A digest of every part's paths, shapes and dtypes."""
    digests = {}
    for name, tree in parts.items():
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        text = "".join(f"{jax.tree_util.keystr(path)} {x.shape} {x.dtype};" for path, x in leaves)
        digests[name] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return digests


def _verify(expected: dict[str, int], parts: dict[str, Any]) -> None:
    found = fingerprint(parts)
    if wrong := [name for name in expected if found.get(name) != expected[name]]:
        raise ValueError(f"the arrays of {', '.join(wrong)} are not those that were saved")
