"""One run in several processes: how they find each other, and how all of them stop at the same step."""

import importlib.util
import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from dreamlite_jax.errors import UserError

ADDRESS, COUNT, INDEX = VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize(address: str = "", count: str = "", index: str = "") -> None:
    """Joins this process to its run, before anything else touches a device.

    Args:
      address, count, index: host:port of process 0, number of processes and which of them this is; by default the
        environment's JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Without any, a TPU host asks the
        machine itself (queued resources, GKE and multislice tell it), and any other machine runs alone.

    Raises:
      UserError: some but not all of the three are given, or they do not fit together.
    """
    if jax.distributed.is_initialized():
        return
    if given := resolve(address, count, index):
        address, processes, process = given
        jax.distributed.initialize(address, processes, process, cluster_detection_method="deactivate")
    elif on_tpu_host():
        jax.distributed.initialize()


def leave() -> None:
    """Leaves the run together with its other processes; without this the first to go takes the others with it."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def resolve(
    address: str = "", count: str = "", index: str = "", environment: Mapping[str, str] | None = None
) -> tuple[str, int, int] | None:
    """(host:port of process 0, number of processes, which of them this is), or None if nobody says."""
    environment = os.environ if environment is None else environment
    values = [flag or environment.get(name, "") for flag, name in zip((address, count, index), VARIABLES, strict=True)]
    if not any(values):
        return None
    if missing := [name for name, value in zip(VARIABLES, values, strict=True) if not value]:
        raise UserError(f"{' and '.join(missing)} must be set too: a run of several processes needs {VARIABLES}")
    address, count, index = values
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"{ADDRESS} is {address!r}; it must be host:port of process 0, such as 10.0.0.1:8476")
    if not count.isdecimal() or not index.isdecimal() or not int(index) < int(count):
        raise UserError(f"{COUNT} is {count!r} and {INDEX} {index!r}; they must be a number and one from 0 to below it")
    return address, int(count), int(index)


def on_tpu_host() -> bool:
    """Whether this machine has TPU chips that JAX can drive."""
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev").glob("vfio/[0-9]*")]
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def primary() -> bool:
    """Whether this process is the one that writes what a run has once: metrics, grids, the export."""
    return jax.process_index() == 0


def any_of_all(flag: bool) -> bool:
    """Whether it is so in any process; all of them must ask."""
    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def wait_for_all(what: str, hours: float = 2.0) -> None:
    """Returns when every process is here; raises after so long. Asks no device: their collectives time out sooner."""
    multihost.get_barrier_sync_fn()(key=f"dreamlite:{what}", timeout_ms=int(hours * 3_600_000))


class StopRequest:
    """Whether the run was asked to stop, by SIGTERM or ahead of a machine's maintenance; all processes agree.

    With several processes JAX's own service hears the notice of any host and chooses a step that all can reach.
    Entered in another thread than the main one, where no signal can be caught, it is never asked.
    """

    def __init__(self):
        self._asked = False
        self._previous = None

    def __enter__(self) -> "StopRequest":
        if not jax.distributed.is_initialized() and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _ask(self, *_) -> None:
        self._asked = True

    def reached(self, step: int) -> bool:
        """To be asked after every step; True at the step after which to save and leave."""
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked
