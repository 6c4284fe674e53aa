"""Whole checkpoints through orbax: state, data iterator, clock and config as one object, written in the background."""

import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from dreamlite_jax.errors import UserError


class Checkpoints:
    """The checkpoints of one workdir.

    A step's folder gets its final name only when complete, so a process killed during a save leaves the one before.
    """

    def __init__(self, workdir: Path, keep: int):
        self.directory = (workdir / "checkpoints").absolute()
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, create=True, enable_async_checkpointing=True, cleanup_tmp_directories=True
            ),
        )

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: Any, position: dict[str, Any], meta: dict[str, Any]) -> None:
        """Starts a save; the arrays are copied off the device before it returns.

        `position` is the data iterator's state: the same on every host, so it is one small JSON beside the arrays.
        """
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(position), meta=ocp.args.JsonSave(meta)
            ),
        )

    def meta(self, step: int, architecture: dict[str, Any]) -> dict[str, Any]:
        """What `save` was told of the run at `step`; touches no device.

        Raises:
          UserError: the checkpoint was written for another architecture.
        """
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        stored, wanted = json.dumps(meta["model"], sort_keys=True), json.dumps(architecture, sort_keys=True)
        if stored != wanted:
            difference = _first_difference(meta["model"], architecture)
            raise UserError(
                f"{self.directory} holds a checkpoint of another architecture: {difference}; use another --workdir, "
                "or the config it was started with"
            )
        return meta

    def restore(self, step: int, shapes: Any, placement: Any, iterator: Any) -> Any:
        """The state at `step` with these shapes, placed by `placement`'s shardings; the iterator moved to its place."""
        shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placement)
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(shapes), data=ocp.args.JsonRestore())
        )
        iterator.set_state(restored["data"])
        return restored["state"]

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def _first_difference(stored: Any, wanted: Any, path: str = "model") -> str:
    if isinstance(stored, dict) and isinstance(wanted, dict):
        for key in sorted(stored.keys() | wanted.keys()):
            if stored.get(key) != wanted.get(key):
                return _first_difference(stored.get(key), wanted.get(key), f"{path}.{key}")
    return f"{path} is {stored!r} there and {wanted!r} here"
