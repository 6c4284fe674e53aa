"""The name table maps onto the torch keys, the layouts are each other's inverse, and nothing else maps."""

import dataclasses
import math

import numpy as np
import oracles
import pytest

from conversion import names
from dreamlite_jax.config import UNetConfig, VAEConfig
from dreamlite_jax.errors import UserError
from dreamlite_jax.model_folder import expected_shapes

ARCHITECTURES = {
    "released U-Net": ("unet", UNetConfig()),
    "small U-Net": ("unet", oracles.SMALL_UNET),
    "standard convolutions, more middle layers": (
        "unet", dataclasses.replace(oracles.SMALL_UNET, separable_convs=False, num_kv_heads=None, mid_layers=3),
    ),
    "TAESDXL": ("vae", VAEConfig()),
    "small autoencoder": ("vae", VAEConfig(latent_channels=16, width=8, encoder_blocks=(1, 2), decoder_blocks=(3, 1))),
}  # fmt: skip
TABLES = {"unet": names.UNET, "vae": names.VAE}


def torch_state(component: str, config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the oracle's parameters; nothing is allocated."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    from conversion import diffusers_config

    with torch.device("meta"):
        if component == "unet":
            model = diffusers.DreamLiteUNetModel.from_config(diffusers_config.unet_to_diffusers(config))
        else:
            model = diffusers.AutoencoderTiny.from_config(diffusers_config.vae_to_diffusers(config))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_and_shapes_are_those_of_diffusers(name):
    component, config = ARCHITECTURES[name]
    tensors = TABLES[component].tensors(expected_shapes(component, config))
    assert {tensor.name: tensor.shape for tensor in tensors.values()} == torch_state(component, config)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_two_paths_have_one_key(name):
    component, config = ARCHITECTURES[name]
    table, shapes = TABLES[component], expected_shapes(component, config)
    keys = {path: table.to_torch(path) for path in shapes}
    assert len(set(keys.values())) == len(keys)


@pytest.mark.parametrize(("half", "table"), [("encoder", names.TAESD_ENCODER), ("decoder", names.TAESD_DECODER)])
def test_nor_in_the_original_taesd(half, table):
    paths = [path for path in expected_shapes("vae", VAEConfig()) if path.startswith(half)]
    keys = {path: table.to_torch(path) for path in paths}
    assert len(set(keys.values())) == len(paths) == 67


def test_the_original_decoder_counts_its_clamp():
    assert names.TAESD_ENCODER.to_torch("encoder/layers_0/kernel") == "0.weight"
    assert names.TAESD_DECODER.to_torch("decoder/layers_0/kernel") == "1.weight"
    assert names.TAESD_DECODER.to_torch("decoder/layers_2/conv_2/bias") == "3.conv.2.bias"


UNKNOWN_PATHS = [
    "conv_in/scale",
    "conv_norm_out/kernel",
    "down_blocks_0/conv_in/kernel",
    "down_blocks/resnets_0/norm1/scale",
    "down_blocks_0/resnets_00/norm1/scale",
    "conv_in",
    "",
    "conv_in/kernel/kernel",
]


@pytest.mark.parametrize("path", UNKNOWN_PATHS)
def test_other_paths_have_no_torch_name(path):
    with pytest.raises(UserError, match="has no name in diffusers DreamLiteUNetModel"):
        names.UNET.to_torch(path)


LAYOUTS = {  # ours: (path, shape, torch shape)
    "convolution": ("conv_in/kernel", (3, 5, 4, 8), (8, 4, 3, 5)),
    "depthwise": ("x/depthwise/kernel", (3, 5, 1, 8), (8, 1, 3, 5)),
    "linear": ("x/kernel", (4, 6), (6, 4)),
    "bias": ("x/bias", (4,), (4,)),
    "scale": ("x/scale", (4,), (4,)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_each_others_inverse(name):
    path, shape, torch_shape = LAYOUTS[name]
    array = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    turned = names.to_torch_layout(path, array)
    assert turned.shape == names.torch_shape(path, shape) == torch_shape
    np.testing.assert_array_equal(names.to_our_layout(path, turned), array)


def test_a_convolution_is_turned_axis_by_axis():
    ours = np.random.default_rng(0).standard_normal((3, 5, 4, 8))
    theirs = names.to_torch_layout("conv_in/kernel", ours)
    h, w, i, o = 2, 4, 1, 7
    assert theirs[o, i, h, w] == ours[h, w, i, o]
