"""Whose folder of latents it is: what it was made of, and who may go on with it."""

import json
from pathlib import Path
from typing import Any

from dreamlite_jax.config import from_dict, to_dict, with_text_state
from dreamlite_jax.data.kept import digest
from dreamlite_jax.data.latents import INFO
from dreamlite_jax.errors import UserError
from dreamlite_jax.json_files import read_json
from dreamlite_jax.training.config import PrecomputeConfig

MADE_OF = "made_of.json"


def plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))


def settings_digest(made_of: dict[str, Any]) -> str:
    """Of all that goes into a record beside its content."""
    config = made_of["config"]
    own = [config["buckets"], config["text"]["max_length"], config["source"]["changed_levels"]]
    return digest(own, {name: value for name, value in made_of.items() if name != "config"})


def binding(config: dict[str, Any]) -> dict[str, Any]:
    """What of a config may not change between starts."""
    free, free_of_source = ("threads", "max_bad_fraction"), ("weight", "least_side", "most_cut")
    source = {name: value for name, value in config["source"].items() if name not in free_of_source}
    return {name: value for name, value in config.items() if name not in free} | {"source": source}


def is_older(output: Path) -> bool:
    """Whether this is a whole folder that does not say what its records were made of."""
    path = output / INFO
    return path.is_file() and "files" not in read_json(path)


def refuse_foreign(output: Path) -> None:
    """Raises `UserError` when the folder holds what precompute did not make."""
    if not output.is_dir() or (output / MADE_OF).is_file():
        return
    own = {"bad_records"}  # of a try that came to nothing
    if any(found.suffix != ".tmp" and found.name not in own for found in output.iterdir()):
        raise UserError(f"--output {output} is not empty and was not made by precompute; choose another folder")


def refuse_other(output: Path, made_of: dict[str, Any], *, begun: bool = False) -> None:
    """Raises `UserError` when there are shards in the folder, or (`begun`) will be, made by other settings."""
    path = output / MADE_OF
    if not path.is_file() or not (begun or any(output.glob("latents-*.array_record"))):
        return
    found, wanted = read_json(path), plain(made_of)
    stored = with_text_state(found.get("config", {}))  # of an older version too
    known = to_dict(from_dict(PrecomputeConfig, stored, f"{path}: config"))
    old, new = binding(plain(known)), binding(wanted["config"])
    other = [f"config.{name}" for name in new if old[name] != new[name]]
    other += [name for name in wanted if name != "config" and name in found and found[name] != wanted[name]]
    if other:
        raise UserError(
            f"--output {output} was made with other settings (see {path}), which differ in {', '.join(other)}; choose "
            "another folder or remove it"
        )
