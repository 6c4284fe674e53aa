"""The folder of a released pipeline (diffusers' layout) held as a model, without a copy on disk.

Configs and tensors are read by the conversion package, which is imported when it is first needed.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dreamlite_jax.config import ModelConfig, TextConfig, from_dict
from dreamlite_jax.errors import UserError
from dreamlite_jax.json_files import read_json
from dreamlite_jax.model_folder import COMPONENTS, Component, unflatten

PIPELINE = "model_index.json"
TEXT_STATE = "_dreamlite_text_state"  # its entry of a folder that `to_torch` made; diffusers skips what begins with "_"
DEFAULT_LATENT_SIZE = 128  # `default_sample_size` of both pipelines


class Sampling(NamedTuple):
    """Defaults of a pipeline's call; a guidance scale of 1 is none."""

    steps: int
    guidance_scale: float
    image_guidance_scale: float


PIPELINES = {
    "DreamLitePipeline": Sampling(30, 3.5, 1.5),
    "DreamLiteMobilePipeline": Sampling(4, 1.0, 1.0),  # distilled: one forward pass a step
}


def is_released(directory: str | Path) -> bool:
    return (Path(directory) / PIPELINE).is_file()


def load_config(directory: str | Path) -> ModelConfig:
    """Architecture and sampling settings from the folder's JSON files.

    Raises:
      UserError: a file is missing, of another pipeline or of another architecture; the message names file and key.
    """
    directory = Path(directory)
    configs = _conversion("diffusers_config")
    index = read_json(directory / PIPELINE)
    name = index.get("_class_name")
    if name not in PIPELINES:
        raise UserError(f"{directory / PIPELINE} is of a {name}; it must be of {' or '.join(PIPELINES)}")
    files = {part: directory / part / "config.json" for part in COMPONENTS}
    files["scheduler"] = directory / "scheduler" / "scheduler_config.json"
    found = {part: read_json(path) for part, path in files.items()}
    vae = configs.vae_from_diffusers(found["vae"], str(files["vae"]))
    return ModelConfig(
        unet=configs.unet_from_diffusers(found["unet"], str(files["unet"])),
        vae=vae,
        text=text_config(index, str(directory / PIPELINE)),
        scheduler=configs.scheduler_from_diffusers(found["scheduler"], str(files["scheduler"])),
        native_size=(found["unet"].get("sample_size") or DEFAULT_LATENT_SIZE) * vae.downsampling,
        edit_size="source",
        **PIPELINES[name]._asdict(),
    )


def text_config(index: Mapping[str, Any], where: str = PIPELINE) -> TextConfig:
    """The text encoder of a released layout. Released weights read the state before the final norm."""
    fields = {"encoder": "qwen3_vl", "source": ".", "max_length": 512, "state": index.get(TEXT_STATE, "before_norm")}
    return from_dict(TextConfig, fields, f"{where}: text")


def load_params(directory: str | Path, component: Component, config: ModelConfig) -> dict[str, Any]:
    """Parameters of the U-Net or the VAE as a nested dict of float32 arrays, from one file or from shards.

    Raises:
      UserError: a missing, extra or misshapen tensor (with its nearest match), a truncated file.
    """
    folder = Path(directory) / component
    tensors = _conversion("from_torch").open_component(folder, component, getattr(config, component))
    return unflatten({path: np.asarray(tensors.read(path), np.float32, order="C") for path in tensors.kinds})


def _conversion(module: str) -> Any:
    """A module of the conversion package: installed beside this one, or in the checkout."""
    for package in ("dreamlite_jax.conversion", "conversion"):
        try:
            return importlib.import_module(f"{package}.{module}")
        except ModuleNotFoundError as error:
            if error.name not in (package, f"{package}.{module}"):
                raise
    raise UserError("a diffusers folder needs the conversion package, which is part of a complete installation")
