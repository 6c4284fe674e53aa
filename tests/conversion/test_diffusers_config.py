"""Configs against config.json of diffusers: there and back, both generations of names, and what is refused."""

import dataclasses
import inspect
import json

import numpy as np
import oracles
import pytest

from conversion import diffusers_config as dc
from dreamlite_jax.config import SchedulerConfig, UNetConfig, VAEConfig
from dreamlite_jax.diffusion import flow
from dreamlite_jax.errors import UserError

UNETS = {
    "released": UNetConfig(),
    "small": oracles.SMALL_UNET,
    "ladder": dataclasses.replace(
        oracles.SMALL_UNET, separable_convs=False, num_kv_heads=None, qk_norm=False, ff_mult=4, mid_layers=2,
        down_blocks=("plain", "self_cross", "self_cross"), up_blocks=("self_cross", "self_cross", "plain"),
    ),
    "channel concatenation": dataclasses.replace(oracles.SMALL_UNET, in_channels=8, condition_layout="channel"),
}  # fmt: skip


def through_json(value):
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("name", UNETS)
def test_unet_there_and_back(name):
    config = UNETS[name]
    assert dc.unet_from_diffusers(through_json(dc.unet_to_diffusers(config)), "x") == config


def test_a_config_that_diffusers_saved_is_read(tmp_path):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = diffusers.DreamLiteUNetModel.from_config(dc.unet_to_diffusers(UNetConfig()))
    model.save_config(tmp_path)
    assert dc.unet_from_diffusers(json.loads((tmp_path / "config.json").read_text()), "x") == UNetConfig()


@pytest.mark.parametrize(
    ("model", "known"),
    [
        ("DreamLiteUNetModel", {**dc.UNET_FIXED, **dc.UNET_DEFAULTS}),
        ("AutoencoderTiny", {**dc.VAE_FIXED, **dc.VAE_DEFAULTS}),
        ("FlowMatchEulerDiscreteScheduler", {**dc.SCHEDULER_FIXED, **dc.SCHEDULER_DEFAULTS}),
    ],
)
def test_defaults_are_those_of_diffusers(model, known):
    """So a key that a file leaves out means the same here and there."""
    diffusers = pytest.importorskip("diffusers")
    signature = inspect.signature(getattr(diffusers, model).__init__).parameters
    listed = {*dc.UNET_IGNORED, *dc.VAE_IGNORED, *dc.UNET_REQUIRED, "self"}
    assert set(signature) <= {*known, *listed}
    for key, value in known.items():
        assert signature[key].default == (tuple(value) if isinstance(value, list) else value), key


def test_the_older_block_names_mean_the_same():
    config = dc.unet_to_diffusers(UNetConfig())
    config["down_block_types"] = ["CrossAttnDownRemoveSelfAttnBlock2D"] * 2 + ["CrossAttnDownBlock2D"]
    config["mid_block_type"] = "UNetMidBlock2DCrossAttn"
    config["up_block_types"] = ["CrossAttnUpBlock2D", "CrossAttnUpRemoveSelfAttnBlock2DV1", "UpBlock2D"]
    assert dc.unet_from_diffusers(config, "x") == UNetConfig()


REFUSED = {
    "SDXL": ({"_class_name": "UNet2DConditionModel", "addition_embed_type": "text_time"}, "of an SDXL U-Net"),
    "another class": ({"_class_name": "FluxTransformer2DModel"}, "of a FluxTransformer2DModel; it must be"),
    "unknown key": ({"ff_mul": 3}, "ff_mul is not a known key; did you mean 'ff_mult'"),
    "unknown block": ({"up_block_types": ["DreamLiteUpBlok2D"] * 3}, "did you mean 'DreamLiteUpBlock2D'"),
    "another mid block": ({"mid_block_type": "UNetMidBlock2D"}, "mid_block_type is 'UNetMidBlock2D'; it must be"),
    "convolutions for projections": (
        {"use_linear_projection": False},
        "use_linear_projection is False; it must be True",
    ),
    "dropout": ({"dropout": 0.1}, "dropout is 0.1; it must be 0.0"),
    "shift of the sinusoid": ({"freq_shift": 1}, "freq_shift is 1; it must be 0"),
    "layer norm of q and k": ({"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm'"),
    "sizes": ({"projection_class_embeddings_input_dim": 1536}, "twice addition_time_embed_dim, 512"),
    "levels": ({"attention_head_dim": [4, 8]}, "3 numbers, one a level"),
    "layers": ({"layers_per_block": [1, 2, 2]}, "same number at every level"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_unets_are_refused(name):
    change, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        dc.unet_from_diffusers({**dc.unet_to_diffusers(UNetConfig()), **change}, "config.json")


def test_a_missing_key_is_named():
    config = dc.unet_to_diffusers(UNetConfig())
    del config["addition_embed_type"]
    with pytest.raises(UserError, match="addition_embed_type is None; it must be 'time'"):
        dc.unet_from_diffusers(config, "config.json")


@pytest.mark.parametrize("config", [VAEConfig(), VAEConfig(16, 8, (1, 2), (2, 1), 0.5, 0.25)], ids=["default", "other"])
def test_vae_there_and_back(config):
    diffusers = pytest.importorskip("diffusers")
    assert dc.vae_from_diffusers(through_json(dc.vae_to_diffusers(config)), "x") == config
    saved = dict(diffusers.AutoencoderTiny.from_config(dc.vae_to_diffusers(config)).config)
    assert dc.vae_from_diffusers(saved, "x") == config


def test_other_autoencoders_are_refused():
    good = dc.vae_to_diffusers(VAEConfig())
    for change, message in (
        ({"_class_name": "AutoencoderKL"}, "of a AutoencoderKL"),
        ({"act_fn": "mish"}, "act_fn is 'mish'"),
        ({"encoder_block_out_channels": [32, 64, 64, 64]}, "one width"),
    ):
        with pytest.raises(UserError, match=message):
            dc.vae_from_diffusers({**good, **change}, "config.json")


@pytest.mark.parametrize(
    "options",
    [
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "base_shift": 0.4, "max_shift": 1.16, "max_image_seq_len": 8192},
        {"shift": 3.0},
    ],
    ids=["default", "other", "constant"],
)
def test_sigmas_are_those_of_the_scheduler(options):
    """Ours from the config, theirs from the scheduler as the pipeline calls it."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**options)
    config = dc.scheduler_from_diffusers(dict(scheduler.config), "x")
    assert dc.scheduler_from_diffusers(dc.scheduler_to_diffusers(config), "x") == config
    for side in (32, 128):
        mu = flow.shift_mu(config, side, side)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 7, 7), mu=mu)
        np.testing.assert_allclose(flow.sampling_sigmas(7, mu), scheduler.sigmas.numpy(), atol=1e-6)


def test_other_schedulers_are_refused():
    good = dc.scheduler_to_diffusers(SchedulerConfig())
    for change, message in (
        ({"_class_name": "DDIMScheduler"}, "of a DDIMScheduler"),
        ({"time_shift_type": "linear"}, "time_shift_type is 'linear'; it must be 'exponential'"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas is True"),
    ):
        with pytest.raises(UserError, match=message):
            dc.scheduler_from_diffusers({**good, **change}, "scheduler_config.json")
