"""Functions of this package in a process of their own."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

MARK = "APART "  # of the lines that an answer is on


class Done(NamedTuple):
    """How the process ended: its exit code, the last answer it gave (empty: none) and what it wrote to stderr."""

    code: int
    answer: dict[str, Any]
    log: str


def answer(value: Mapping[str, Any]) -> None:
    """Gives an answer, from inside the process; a later one takes its place."""
    print(MARK + json.dumps(value), flush=True)


def call(
    module: str,
    function: str,
    *args: Any,
    environment: Mapping[str, str] | None = None,
    timeout_sec: float | None = None,
) -> Done:
    """Calls a function of a module here with arguments that JSON can hold.

    The process finds modules where this one does: a folder of ours on its path could hide others, as an installed
    dreamlite_jax/types.py would the standard library's.

    Raises:
      subprocess.TimeoutExpired: no end within the time.
    """
    code = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        f"import json; from {__package__} import {module}; {module}.{function}(*json.loads(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(args)],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout_sec,
    )
    answers = [line.removeprefix(MARK) for line in done.stdout.splitlines() if line.startswith(MARK)]
    return Done(done.returncode, json.loads(answers[-1]) if answers else {}, done.stderr)
