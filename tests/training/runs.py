"""Runs of the training command in processes of their own, one or two a run, that tests can kill as they please."""

import json
import multiprocessing
import os
import random
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax

from dreamlite_jax import train
from dreamlite_jax.parallel import sharding
from dreamlite_jax.training import checkpoint, metrics

PROCESSES = multiprocessing.get_context("forkserver")  # imports once, and forks from there
PROCESSES.set_forkserver_preload(["dreamlite_jax.training.loop", "dreamlite_jax.training.stages.flow_matching"])
Prepare = Callable[[Path], None]


def run(config: str, workdir: Path, flags: tuple[str, ...], devices: int, prepare: Prepare | None) -> None:
    """The body of one process: stdout and stderr go to `workdir`.log."""
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    jax.config.update("jax_compilation_cache_dir", str(workdir.parent / "cache"))  # as the quick start does
    sharding.MIN_SHARDED_SIZE = 64  # so that there is something to shard in so small a network
    sys.stderr = sys.stdout = workdir.with_suffix(".log").open("a", buffering=1)  # left open, for a traceback
    if prepare:
        prepare(workdir)
    sys.exit(train.main(["--config", config, "--workdir", str(workdir), *flags]))


def start(
    config: str, workdir: Path, prepare: Prepare | None = None, flags: tuple[str, ...] = (), devices: int = 2
) -> multiprocessing.Process:
    """A run in one process."""
    process = PROCESSES.Process(target=run, args=(config, workdir, flags, devices, prepare))
    process.start()
    return process


def start_pair(
    config: str, workdir: Path, prepare: Prepare | None = None, flags: tuple[str, ...] = (), devices: int = 4
) -> list[multiprocessing.Process]:
    """The same in two processes, which find each other as on any cluster; only the first gets `prepare`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    there = ("--coordinator", f"127.0.0.1:{port}", "--num_processes", "2", "--process_id")
    return [start(config, workdir, None if i else prepare, (*flags, *there, str(i)), devices) for i in (0, 1)]


def finish(process: multiprocessing.Process, workdir: Path, codes: tuple[int, ...] = (0,)) -> int:
    """Waits for the end, which must have one of these exit codes (minus the number of a signal, 75 …)."""
    process.join(timeout=1800)
    assert process.exitcode is not None, "the run hangs"
    assert process.exitcode in codes, (process.exitcode, workdir.with_suffix(".log").read_text()[-6000:])
    return process.exitcode


def finish_pair(processes: list[multiprocessing.Process], workdir: Path, codes: tuple[int, ...] = (0,)) -> int:
    """Waits for both; when the first was killed the second is too, as a launcher would."""
    code = finish(processes[0], workdir, codes)
    if code < 0:
        processes[1].kill()
        processes[1].join()
    else:
        assert finish(processes[1], workdir, codes) == code
    return code


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def saved_steps(workdir: Path) -> list[str]:
    return sorted(path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())


def weights(workdir: Path) -> bytes:
    """Of the exported U-Net."""
    return (workdir / "model" / "unet.safetensors").read_bytes()


# --- what may befall a run: each changes the process that it is called in, and can be sent to it


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_step(step: int, act: Callable[[], None]) -> None:
    """Calls `act` when the loop has given this step to the device."""
    add = metrics.Metrics.add

    def adding(self, now, values):
        add(self, now, values)
        if now == step:
            act()

    metrics.Metrics.add = adding


class KillAtStep:
    """SIGKILL at a step, when the save of an earlier one, which goes on in the background, has ended."""

    def __init__(self, step: int, saved: int):
        self.step, self.saved = step, saved

    def __call__(self, workdir: Path) -> None:
        def act():
            wait_for_save(workdir, self.saved)
            die()

        at_step(self.step, act)


def wait_for_save(workdir: Path, step: int) -> None:
    while not (workdir / "checkpoints" / str(step)).is_dir():
        time.sleep(0.01)


def kill_while_saving_step_8(workdir: Path) -> None:
    save = checkpoint.Checkpoints.save

    def saving(self, step, *args):
        save(self, step, *args)  # returns while the files are being written
        if step == 8:
            die()

    checkpoint.Checkpoints.save = saving


def full_disk_at_step_7(workdir: Path) -> None:
    """No file may grow above 64 KiB from then on, so that the save of step 8 fails in the middle."""

    def act():
        wait_for_save(workdir, 4)  # that one is to succeed
        os.truncate(workdir.with_suffix(".log"), 0)  # so that there is room for what is said
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))

    at_step(7, act)


class Mishap:
    """A signal at a random moment of a few steps from the start: between steps, in them, while a save is written."""

    def __init__(self, seed: int, steps: int):
        self.seed, self.steps = seed, steps

    def __call__(self, workdir: Path) -> None:
        dice = random.Random(self.seed)
        number = dice.choice([signal.SIGKILL, signal.SIGTERM])
        after, delay, seen = dice.randrange(self.steps), dice.random() * 0.1, []
        add = metrics.Metrics.add

        def strike():
            time.sleep(delay)
            print(f"struck by {number.name} after {len(seen)} steps", file=sys.stderr, flush=True)
            os.kill(os.getpid(), number)

        def adding(metrics, step, values):
            add(metrics, step, values)
            seen.append(step)
            time.sleep(0.05)  # or all steps would be over before a signal comes
            if len(seen) == after + 1:
                threading.Thread(target=strike).start()

        metrics.Metrics.add = adding


def slow_steps_and_a_notice(workdir: Path) -> None:
    """SIGTERM to this process alone, and steps so slow that there are some left when all have heard of it."""
    add, seen = metrics.Metrics.add, []

    def adding(self, step, values):
        add(self, step, values)
        seen.append(step)
        time.sleep(0.25)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    metrics.Metrics.add = adding
