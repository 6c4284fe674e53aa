"""What a conversion takes of a machine, and what the machine has left: memory and disk. Without JAX."""

import operator
import os
import resource
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from dreamlite_jax.errors import UserError


def peak_memory_bytes() -> int:
    """The largest resident memory this process has had."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    for line in lines:
        if line.startswith("VmHWM:"):  # `ru_maxrss` of a child begins with that of its parent
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def cores() -> int:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def bounded_threads(threads: int) -> int:
    """A number of threads that kernels can be started with: 0 is one for each core, and more are not started.

    LiteRT's kernels end the process without a word where the system gives them no more threads, and below that bound
    more threads than cores are slower. What is not started is said in one line on stderr.

    Raises:
      UserError: a number that is negative or not whole.
    """
    try:
        asked = operator.index(threads)
    except TypeError:
        asked = -1
    if asked < 0 or isinstance(threads, bool):
        raise UserError(f"threads is {threads!r}; it must be 0 (one for each core) or a positive whole number")
    most = cores()
    if asked > most:
        print(
            f"threads is {asked}; this process has {most} {'core' if most == 1 else 'cores'}: using {most}",
            file=sys.stderr,
        )
    return min(asked, most) or most


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that new processes can use: what the system has free, or the cgroup where that is less.

    None where the system does not say.
    """
    try:
        fields = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
    except OSError:
        return None
    free = [int(fields["MemAvailable"].split()[0]) * 1024]
    try:
        group = (root / "proc/self/cgroup").read_text().strip().rpartition("::")[2].strip("/")
    except OSError:
        group = ""
    top = root / "sys/fs/cgroup"
    inner = top / group
    for folder in (inner, *inner.parents):
        if (folder / "memory.max").is_file() and (limit := (folder / "memory.max").read_text().strip()) != "max":
            cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used = int((folder / "memory.current").read_text()) - int(cached["inactive_file"])
            free.append(max(0, int(limit) - used))
        if folder == top:
            break
    return min(free)


def check_memory(what: str, needed: int) -> None:
    """Raises `UserError` when `what`, a sentence's subject, needs more memory than is free."""
    free = available_memory()
    if free is not None and needed > free:
        raise UserError(f"{what} takes {needed / 1e9:.1f} GB of memory; {free / 1e9:.1f} GB are free")


def available_disk(folder: Path) -> int:
    """Free bytes where `folder` is or will be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def check_disk(needed: int, folder: Path) -> None:
    """Raises `UserError` when there is less disk than needed for `folder`."""
    free = available_disk(folder)
    if needed > free:
        raise UserError(f"the files take {needed / 1e9:.1f} GB of disk; {free / 1e9:.1f} GB are free for {folder}")


def bytes_of(paths: Iterable[Path]) -> int:
    """Size of files, and of all files in folders."""
    files = (file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]))
    return sum(file.stat().st_size for file in files if file.is_file())
