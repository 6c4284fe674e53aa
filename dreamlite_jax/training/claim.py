"""One run, one workdir: a file that says whose it is for as long as that run lives."""

import json
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import jax

from dreamlite_jax.errors import UserError
from dreamlite_jax.json_files import write_json
from dreamlite_jax.parallel import distributed

NAME = "run.lock"  # in a workdir
BEAT = 10.0  # seconds between two signs of life
SILENCE = 3.5 * BEAT  # without one for so long a run on another machine counts as dead
OLD = 600.0  # seconds by the clocks of both machines after which nobody needs to wait to see it
UNREADABLE = 2.0  # seconds for a file that is being written to become whole


class Claim:
    """Holds a workdir for one run, as a context; several hosts of one run are one owner, and its primary writes.

    The file is made where none may stand yet, and rewritten every few seconds. A second start on the same machine asks
    whether that process lives, one elsewhere (or in another container) watches whether the file still changes: so a
    killed run holds nothing, and storage that knows no locks will do.
    """

    def __init__(self, workdir: Path):
        self.path = workdir / NAME
        self._own = {"token": uuid.uuid4().hex, **this_process(), "began": time.strftime("%F %T"), "beats": 0}
        self._lost = ""  # who took the workdir over, once somebody has
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, daemon=True)

    def __enter__(self) -> "Claim":
        """Raises `UserError` where another run lives; says so where it takes over from one that does not."""
        refused = None
        if distributed.primary():
            try:
                self._take()
            except (UserError, OSError) as error:
                refused = error
        if jax.process_count() > 1 and distributed.any_of_all(refused is not None):
            raise refused or UserError(f"{self.path.parent}: process 0 of this run was refused, and says why")
        if refused:
            raise refused
        if distributed.primary():
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
            if not self._lost:
                self.path.unlink(missing_ok=True)

    def check(self) -> None:
        """Raises `UserError` if somebody else has taken the workdir over; to be asked before anything is written."""
        if self._lost:
            raise UserError(
                f"{self.path.parent} was taken over by {self._lost} while this run gave no sign of life; it stops "
                "here, and writes nothing more"
            )

    def _take(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(3):  # another start may be taking over the same one
            try:
                with self.path.open("x") as file:
                    json.dump(self._stamped(), file)
            except FileExistsError:
                self._take_away(self._dead())
            else:
                return
        raise UserError(f"{self.path} is taken again and again by others; let one start at a time use this workdir")

    def _dead(self) -> dict[str, Any]:
        """Whose claim stands there, if that run lives no more; raises `UserError` if it does."""
        found = read(self.path)
        if not found:
            return {}
        if all(found.get(key) == self._own[key] for key in ("machine", "boot", "namespace")):
            dead = started_at(found.get("pid", 0)) != found.get("started")
        elif abs(time.time() - found.get("time", 0)) > OLD:
            dead = True
        else:
            say(f"{self.path.parent} belongs to {told(found)}: watching for {SILENCE:.0f} s whether it lives")
            until = time.monotonic() + SILENCE
            while (now := read(self.path)) == found and time.monotonic() < until:
                time.sleep(BEAT / 10)
            if not now:  # it has ended meanwhile
                return {}
            dead = now == found
        if not dead:
            raise UserError(
                f"--workdir {self.path.parent} is in use by {told(found)}; wait for it to end, stop it, or use another "
                "--workdir"
            )
        return found

    def _take_away(self, dead: dict[str, Any]) -> None:
        """Removes a dead run's file; if another start was quicker, what it wrote stays."""
        aside = self.path.with_name(f"{NAME}.{self._own['token']}")
        try:
            os.replace(self.path, aside)
        except FileNotFoundError:
            return
        if read(aside) != dead and not self.path.exists():
            os.replace(aside, self.path)
            return
        aside.unlink(missing_ok=True)
        if dead:
            say(f"{self.path.parent} was left by {told(dead)}, which lives no more: this run takes it over")

    def _stamped(self) -> dict[str, Any]:
        return {**self._own, "time": time.time()}

    def _beat_on(self) -> None:
        while not self._ended.wait(BEAT):
            try:
                if (found := read(self.path)) and found["token"] != self._own["token"]:
                    self._lost = told(found)
                    return
                self._own["beats"] += 1
                write_json(self.path, self._stamped())
            except OSError as error:  # storage that does not answer for a while; the run's own writes will say it
                say(f"{self.path} could not be written ({error})")


def this_process() -> dict[str, Any]:
    """What tells a process from all others: machine, its start, the container, number and start of the process."""

    def text(path: str) -> str:
        return Path(path).read_text().strip() if Path(path).is_file() else ""

    space = Path("/proc/self/ns/pid")
    return {
        "machine": socket.gethostname(),
        "boot": text("/proc/sys/kernel/random/boot_id"),
        "namespace": os.readlink(space) if space.is_symlink() else "",
        "pid": os.getpid(),
        "started": started_at(os.getpid()),
    }


def started_at(pid: int) -> str | None:
    """When a process of this machine began, in ticks since boot; "" where only its being alive can be told (no /proc),
    None if there is none."""
    if Path("/proc/self/stat").exists():
        try:
            state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if state in "ZX" else rest[18]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""


def read(path: Path) -> dict[str, Any]:
    """A claim; {} if there is none, or one that a kill cut short."""
    until = time.monotonic() + UNREADABLE
    while True:
        try:
            found = json.loads(path.read_text())
            if isinstance(found, dict) and isinstance(found.get("token"), str):
                return found
        except FileNotFoundError:
            return {}
        except ValueError:
            pass
        if time.monotonic() > until:
            return {}
        time.sleep(0.05)


def told(claim: dict[str, Any]) -> str:
    """Whose a claim is, in words."""
    return f"process {claim.get('pid')} on {claim.get('machine')}, begun {claim.get('began')}"


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
