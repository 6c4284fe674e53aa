"""JSON files that describe models and measurements."""

import json
import os
import uuid
from pathlib import Path
from typing import Any

from dreamlite_jax.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; a `UserError` names the file when it is missing or holds something else."""
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}; it must be an object")
    return value


def write_json(path: Path, value: Any) -> None:
    """Writes JSON in two-space lines, paths as text, making the folder; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # several hosts may write it at once
    try:
        temporary.write_text(json.dumps(value, indent=2, default=os.fspath) + "\n", "utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
