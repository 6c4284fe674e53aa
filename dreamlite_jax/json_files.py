"""JSON files that describe models."""

import json
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
