"""A weight that is no number ends a conversion in either direction, and loading, with its name."""

import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conversion import exports, from_torch, to_torch
from dreamlite_jax import load_model, model_folder
from dreamlite_jax.errors import UserError


def spoil(path, value):
    """Makes one value of the file's largest tensor that; returns the tensor's name."""
    tensors = load_file(path)
    name = max(tensors, key=lambda name: tensors[name].size)
    tensors[name] = tensors[name].copy()
    tensors[name].flat[-1] = value
    save_file(tensors, path, {"format": "pt"})
    return name


@pytest.mark.parametrize("part, value", [("unet", np.nan), ("vae", np.inf)])
def test_of_a_model_folder(small_model, tmp_path, part, value):
    model = tmp_path / "model"
    shutil.copytree(small_model, model)
    name = spoil(model / f"{part}.safetensors", value)
    with pytest.raises(UserError, match=f"{part}.safetensors: of {name} 1 of "):
        to_torch.convert(model, tmp_path / "back")
    with pytest.raises(UserError, match=f"{part}.safetensors: of {name} 1 of "):
        exports.load("unet" if part == "unet" else "vae_decoder", model, model_folder.load_config(model))
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("part, value", [("unet", -np.inf), ("vae", np.nan), ("text_encoder", np.nan)])
def test_of_a_released_folder(released, tmp_path, part, value):
    source = tmp_path / "theirs"
    shutil.copytree(released[1], source)
    file = sorted((source / part).glob("*.safetensors"))[-1]
    name = spoil(file, value)
    with pytest.raises(UserError, match=f"{file.name}: of {name} 1 of "):
        from_torch.convert(str(source), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    with pytest.raises(UserError, match=f"{file.name}: of {name} 1 of "):
        load_model(source).encoder  # noqa: B018 (it is loaded when it is asked for)
