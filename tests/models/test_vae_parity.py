"""The autoencoder against diffusers `AutoencoderTiny`, on random weights and on the real TAESDXL."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import linen as nn
from safetensors.numpy import load_file
from wrong_layers import bilinear, same_padding_conv

from conversion import names
from dreamlite_jax.config import VAEConfig
from dreamlite_jax.model_folder import expected_shapes, unflatten
from dreamlite_jax.models import vae

TOLERANCE = 1e-5  # largest absolute difference of a latent or a pixel of order 1, float32
CAUGHT = 10 * TOLERANCE
REAL_TOLERANCE = 1e-4  # of the real weights, whose activations are larger
CONFIGS = {
    "small": VAEConfig(width=16, encoder_blocks=(1, 1, 1, 1), decoder_blocks=(1, 1, 1, 1)),
    "16 latent channels, 24 wide": VAEConfig(
        latent_channels=16, width=24, encoder_blocks=(1, 2, 1, 1), decoder_blocks=(2, 1, 1, 1)
    ),
    "f4": VAEConfig(width=16, latent_channels=8, encoder_blocks=(1, 2, 1), decoder_blocks=(1, 2, 1)),
    "scaled and shifted": VAEConfig(
        width=16, encoder_blocks=(1, 1, 1, 1), decoder_blocks=(1, 1, 1, 1), scaling_factor=0.4, shift_factor=0.1
    ),
}
DEFAULT = VAEConfig()


def images(height: int, width: int, batch: int = 2) -> np.ndarray:
    """Random pictures in [-1, 1]."""
    return np.random.default_rng(0).uniform(-1, 1, (batch, height, width, 3)).astype(np.float32)


def latents(config: VAEConfig, height: int, width: int, batch: int = 2) -> np.ndarray:
    """Random latents, some beyond the clamp of the decoder's input."""
    return 2 * np.random.default_rng(1).standard_normal((batch, height, width, config.latent_channels), np.float32)


@functools.cache
def model_and_params(config: VAEConfig):
    model = oracles.torch_vae(config)
    return model, jax.tree.map(jnp.asarray, oracles.flax_params(model, "vae", config))


def apply(config: VAEConfig, params, method: str, x: np.ndarray) -> np.ndarray:
    return np.asarray(vae.VAE(config).apply({"params": params}, jnp.asarray(x), method=method))


def oracle_encode(model, x: np.ndarray) -> np.ndarray:
    """As the pipeline does: the model's latents, shifted and scaled by its config."""
    import torch

    with torch.no_grad():
        z = model.encode(torch.from_numpy(x).permute(0, 3, 1, 2)).latents
    return (z.permute(0, 2, 3, 1).numpy() - model.config.shift_factor) * model.config.scaling_factor


def oracle_decode(model, z: np.ndarray) -> np.ndarray:
    import torch

    z = z / model.config.scaling_factor + model.config.shift_factor
    with torch.no_grad():
        x = model.decode(torch.from_numpy(z.astype(np.float32)).permute(0, 3, 1, 2)).sample
    return x.permute(0, 2, 3, 1).numpy()


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max())


def test_parameter_counts():
    shapes = expected_shapes("vae", DEFAULT)
    counts = {
        half: sum(math.prod(s) for p, s in shapes.items() if p.startswith(half)) for half in ("encoder", "decoder")
    }
    assert counts == {"encoder": 1_222_532, "decoder": 1_222_531}


@pytest.mark.parametrize("name", CONFIGS)
def test_encoding_equals_diffusers(name):
    config = CONFIGS[name]
    model, params = model_and_params(config)
    x = images(24, 40)
    theirs = oracle_encode(model, x)
    assert theirs.std() > 0.01
    assert difference(apply(config, params, "encode", x), theirs) <= TOLERANCE


@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_equals_diffusers(name):
    config = CONFIGS[name]
    model, params = model_and_params(config)
    z = latents(config, 3, 5)
    theirs = oracle_decode(model, z)
    assert theirs.std() > 0.01
    assert difference(apply(config, params, "decode", z), theirs) <= TOLERANCE


def test_the_default_network_equals_diffusers():
    model, params = model_and_params(DEFAULT)
    x, z = images(16, 24, 1), latents(DEFAULT, 2, 3, 1)
    assert difference(apply(DEFAULT, params, "encode", x), oracle_encode(model, x)) <= TOLERANCE
    assert difference(apply(DEFAULT, params, "decode", z), oracle_decode(model, z)) <= TOLERANCE


PATCHES = {
    "SAME padding": ("encode", vae, "conv", same_padding_conv),
    "bilinear upsampling": ("decode", vae, "upsample_nearest", bilinear),
    "no clamp of the latents": ("decode", jnp, "tanh", lambda x: x),
    "leaky activation": ("encode", nn, "relu", nn.leaky_relu),
    "silu": ("decode", nn, "relu", nn.silu),
}
WRONG_INPUTS = {
    "images in 0..1": ("encode", lambda x: (x + 1) / 2),
    "images in 0..255": ("encode", lambda x: (x + 1) * 127.5),
    "blue first": ("encode", lambda x: x[..., ::-1].copy()),
    "rows for columns": ("encode", lambda x: x.swapaxes(1, 2).copy().reshape(x.shape)),
    "scaled latents": ("decode", lambda z: z * 1.01),
}


def check(config: VAEConfig, method: str, change=lambda x: x) -> float:
    """Difference of one half of the autoencoder from the oracle, our input changed."""
    model, params = model_and_params(config)
    x, oracle = (images(24, 40), oracle_encode) if method == "encode" else (latents(config, 3, 5), oracle_decode)
    return difference(apply(config, params, method, change(x)), oracle(model, x))


@pytest.mark.parametrize("name", PATCHES)
def test_a_wrong_network_is_caught(name, monkeypatch):
    method, *patch = PATCHES[name]
    config = CONFIGS["small"]
    assert check(config, method) <= TOLERANCE
    monkeypatch.setattr(*patch)
    assert check(config, method) > CAUGHT


@pytest.mark.parametrize("name", WRONG_INPUTS)
def test_wrong_inputs_are_caught(name):
    assert check(CONFIGS["small"], *WRONG_INPUTS[name]) > CAUGHT


@pytest.mark.parametrize("method", ["encode", "decode"])
@pytest.mark.parametrize("change", [{"scaling_factor": 1.0}, {"shift_factor": 0.0}], ids=["scale", "shift"])
def test_a_forgotten_normalisation_is_caught(method, change):
    config = CONFIGS["scaled and shifted"]
    model, params = model_and_params(config)
    wrong = dataclasses.replace(config, **change)
    x, oracle = (images(24, 40), oracle_encode) if method == "encode" else (latents(config, 3, 5), oracle_decode)
    assert difference(apply(config, params, method, x), oracle(model, x)) <= TOLERANCE
    assert difference(apply(wrong, params, method, x), oracle(model, x)) > CAUGHT


# --- the real weights


@pytest.fixture(scope="module")
def taesdxl():
    """TAESDXL in both forms: the torch model and our parameters, read from the original files."""
    folder = oracles.SHARED_DATA / "taesdxl"
    files = {half: folder / f"taesdxl_{half}.safetensors" for half in ("encoder", "decoder")}
    if not all(path.is_file() for path in files.values()):
        pytest.skip(f"the real TAESDXL files are not in {folder}; DREAMLITE_SHARED_DATA names another folder")
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    stored = {half: {k: v.astype(np.float32) for k, v in load_file(path).items()} for half, path in files.items()}
    state = {f"encoder.layers.{key}": value for key, value in stored["encoder"].items()}
    for key, value in stored["decoder"].items():  # its layer 0 is the clamp, which diffusers does not count
        index, rest = key.split(".", 1)
        state[f"decoder.layers.{int(index) - 1}.{rest}"] = value
    model = diffusers.AutoencoderTiny().eval()
    model.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})

    params = {}
    for path in expected_shapes("vae", DEFAULT):
        half = path.split("/")[0]
        table = names.TAESD_ENCODER if half == "encoder" else names.TAESD_DECODER
        params[path] = jnp.asarray(names.to_our_layout(path, stored[half][table.to_torch(path)]))
    return model, unflatten(params)


def test_real_weights_equal_diffusers(taesdxl):
    model, params = taesdxl
    # A smooth picture: on noise the decoder saturates.
    rows, columns = np.meshgrid(np.linspace(-1, 1, 64), np.linspace(-1, 1, 96), indexing="ij")
    x = np.stack([rows, columns, np.sin(4 * rows * columns)], -1)[None].astype(np.float32)
    theirs = oracle_encode(model, x)
    assert theirs.std() > 0.3
    assert difference(apply(DEFAULT, params, "encode", x), theirs) <= REAL_TOLERANCE
    restored = oracle_decode(model, theirs)
    assert np.abs(restored - x).mean() < 0.1  # the weights are those of a working autoencoder
    assert difference(apply(DEFAULT, params, "decode", theirs), restored) <= REAL_TOLERANCE
