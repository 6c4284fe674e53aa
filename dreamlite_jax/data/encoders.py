"""Which text encoder the states in a folder of latents come from."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dreamlite_jax.config import ModelConfig, TextConfig, to_dict
from dreamlite_jax.data.config import SourceConfig
from dreamlite_jax.errors import UserError

ALIKE = 0.1  # relative distance within which states of the empty prompt are one encoder's: machines differ by rounding


def check_encoders(sources: Sequence[SourceConfig], infos: Sequence[dict[str, Any]], model: ModelConfig) -> None:
    """Raises `UserError` unless the states of all folders come from one text encoder, the one of the model's config.

    `infos` are those of the folders. Older ones say less of their encoder, so the states of the empty prompt count too.
    """
    text = text_identity(model.text, model.text.sha256)
    known = {name: (value, "config.model.text") for name, value in text.items() if value not in ("", None)}
    first: tuple[np.ndarray, str] | None = None
    for path, info in ((source.path, info) for source, info in zip(sources, infos, strict=True)):
        differs, states = "", np.asarray(info["null_states"], np.float32)
        for name, value in _encoder_of(info).items():
            wanted, whose = known.setdefault(name, (value, path))
            if value != wanted:
                differs = f"{_short(name, value)}, {whose} has {_short(name, wanted)}"
                break
        else:
            if states.shape[-1] != model.unet.text_dim:
                raise UserError(
                    f"config.model.unet.text_dim is {model.unet.text_dim}, but the data have text states of width "
                    f"{states.shape[-1]}: those of {path}, which is of another encoder"
                )
            if first is None:
                first = states, path
            elif len(states) != len(first[0]) or _distance(states, first[0]) > ALIKE:
                differs = f"those of the empty prompt are not those of {first[1]}"
        if differs:
            raise UserError(
                f"{path} holds text states of another encoder: {differs}; a network reads those of one encoder: "
                "precompute that folder with it, or leave it out"
            )


def _distance(states: np.ndarray, others: np.ndarray) -> float:
    return float(np.linalg.norm(states - others) / max(float(np.linalg.norm(others)), 1e-9))


def text_identity(config: TextConfig, sha256: str) -> dict[str, Any]:
    """What the states of prompts depend on: the encoder, which of its states, and the sha256 of its weights."""
    about = {name: value for name, value in to_dict(config).items() if name not in ("source", "max_length")}
    return about | {"sha256": sha256}


def _encoder_of(info: dict[str, Any]) -> dict[str, Any]:
    """The `text_identity` of a folder, as far as it says; its `state` is held to the config's elsewhere."""
    if "text" in info:
        found = info["text"]
    else:
        config = info.get("config", {}).get("text", {})
        found = {name: config[name] for name in ("encoder", "sha256") if name in config}
    return {name: value for name, value in found.items() if name != "state" and value not in ("", None)}


def _short(name: str, value: Any) -> str:
    return f"{name} {value[:12]}…" if name == "sha256" else f"{name} {value}"
