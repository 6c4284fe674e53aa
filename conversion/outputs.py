"""Folders and reports that conversions write, and the checks of their paths before any work. Without JAX."""

import contextlib
import fcntl
import glob
import importlib.metadata
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import dreamlite_jax
from dreamlite_jax import cli


@contextlib.contextmanager
def new_folder(output: Path, *, replace: bool = False) -> Iterator[Path]:
    """`model_folder.new_folder` for --output, after removing what killed processes left of the same name.

    A living process holds a lock on the folder it fills, so that another does not take it for a leftover.

    Raises:
      UserError: the folder cannot be made, or has something in it and `replace` is off.
    """
    from dreamlite_jax import model_folder

    output = Path(output).absolute()
    cli.check_writable("--output", output.parent)
    for leftover in output.parent.glob(f".{glob.escape(output.name)}.????????.part"):
        with contextlib.suppress(FileNotFoundError), _locked(leftover) as free:
            if free:
                shutil.rmtree(leftover, ignore_errors=True)
    # The lock is let go last, when the folder has its name.
    with contextlib.ExitStack() as held, model_folder.new_folder(output, replace=replace) as folder:
        held.enter_context(_locked(folder))
        yield folder


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Holds the lock of a folder; False when another process has it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        yield free
    finally:
        os.close(handle)


def check_file(path: Path | None) -> None:
    """Raises `UserError` unless the file of --output can be written, if one is asked for."""
    if path is not None:
        cli.check_file("--output", path)


def versions(*packages: str) -> dict[str, str]:
    """Of Python, of this package and of those that shape what is written."""
    found = {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy", *packages)}
    return {"python": sys.version.split()[0], "dreamlite_jax": dreamlite_jax.__version__, **found}
