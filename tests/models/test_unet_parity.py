"""The U-Net against diffusers `DreamLiteUNetModel` on the same random weights, and every way to get it wrong."""

import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import linen as nn
from wrong_layers import bilinear, same_padding_conv

from dreamlite_jax.config import UNetConfig
from dreamlite_jax.model_folder import expected_shapes
from dreamlite_jax.models import blocks, unet

SMALL_TOLERANCE, FULL_TOLERANCE = 1e-5, 1e-4  # largest absolute difference of a velocity, float32
CAUGHT = 10 * SMALL_TOLERANCE  # what a negative control must exceed

# One config with every kind of block in two levels, for the controls.
CONTROL = dataclasses.replace(
    oracles.SMALL_UNET, block_out_channels=(32, 48), transformer_layers=(1, 1), num_heads=(2, 3),
    down_blocks=("cross", "self_cross"), up_blocks=("self_cross", "cross"),
)  # fmt: skip

# name: panel height and width (latent), timesteps, kept text tokens, text length
INPUTS = {
    "square": (8, 8, [500.0], [5], 5),
    "wide": (4, 12, [250.5], [7], 7),
    "tall": (12, 4, [999.0], [7], 7),
    "ragged batch": (4, 8, [731.0, 20.0, 400.0], [1, 9, 4], 9),
    "first and last timestep": (4, 8, [0.0, 1000.0], [9, 3], 9),
}
FULL_INPUTS = {
    "square": (16, 16, [500.0], [32], 32),
    "wide": (8, 24, [250.5], [16], 16),
    "tall": (24, 8, [999.0], [16], 16),
    "ragged batch": (8, 8, [731.0, 20.0, 400.0], [1, 16, 9], 16),
    "first and last timestep": (8, 8, [0.0, 1000.0], [16, 5], 16),
}


def velocity(config: UNetConfig, params, inputs: oracles.UNetInputs) -> np.ndarray:
    """Ours, operation by operation: for many variants of one network this is quicker than to compile each."""
    return np.asarray(unet.UNet(config).apply({"params": params}, *map(jnp.asarray, inputs.arrays())))


def compiled_velocity(config: UNetConfig, params, inputs: oracles.UNetInputs, **options) -> np.ndarray:
    """Ours, as one program."""
    arrays = tuple(map(jnp.asarray, inputs.arrays()))
    program = jax.jit(unet.UNet(config).apply).lower({"params": params}, *arrays).compile(compiler_options=options)
    return np.asarray(program({"params": params}, *arrays))


QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max())


@functools.cache
def model_and_params(config: UNetConfig):
    model = oracles.torch_unet(config)
    return model, jax.tree.map(jnp.asarray, oracles.flax_params(model, "unet", config))


def test_the_published_network_has_its_parameters():
    assert sum(map(math.prod, expected_shapes("unet", UNetConfig()).values())) == 389_968_388


@pytest.mark.parametrize("name", INPUTS)
def test_small_network_equals_diffusers(name):
    config = oracles.SMALL_UNET
    model, params = model_and_params(config)
    inputs = oracles.unet_inputs(config, *INPUTS[name])
    theirs = oracles.torch_velocity(model, inputs)
    assert theirs.std() > 0.1
    assert difference(compiled_velocity(config, params, inputs, **QUICK), theirs) <= SMALL_TOLERANCE


LADDER = {
    "standard convolutions": {"separable_convs": False},
    "as many key heads as query heads": {"num_kv_heads": None},
    "grouped keys": {"num_heads": (4, 4), "num_kv_heads": 2},
    "no q and k norm": {"qk_norm": False, "num_kv_heads": None},
    "self-attention everywhere": {"down_blocks": ("self_cross",) * 2, "up_blocks": ("self_cross",) * 2},
    "feed-forward 4": {"ff_mult": 4},
    "plain first block": {"down_blocks": ("plain", "self_cross"), "up_blocks": ("self_cross", "plain")},
    "two middle layers": {"mid_layers": 2, "transformer_layers": (2, 1)},
    "channel concatenation": {"condition_layout": "channel", "in_channels": 8},
    "SDXL's shape": {
        "separable_convs": False, "num_kv_heads": None, "qk_norm": False, "ff_mult": 4, "layers_per_block": 2,
        "down_blocks": ("plain", "self_cross"), "up_blocks": ("self_cross", "plain"), "transformer_layers": (0, 2),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", LADDER)
def test_every_rung_of_the_compression_ladder_equals_diffusers(name):
    config = dataclasses.replace(CONTROL, **LADDER[name])
    model, params = model_and_params(config)
    inputs = oracles.unet_inputs(config, *INPUTS["ragged batch"])
    ours = compiled_velocity(config, params, inputs, **QUICK)
    assert difference(ours, oracles.torch_velocity(model, inputs)) <= SMALL_TOLERANCE


# --- negative controls: each trap of the architecture, sprung. All go through the check above.


class ResidualAroundMissingAttention(blocks.TransformerBlock):
    @nn.compact
    def __call__(self, x, text, bias):
        attention = (self.heads, self.kv_heads, self.qk_norm, self.dtype)
        y = blocks.LayerNorm(name="norm1")(x)
        x = x + (blocks.Attention(*attention, name="attn1")(y, y, None) if self.self_attention else y)
        x = x + blocks.Attention(*attention, name="attn2")(blocks.LayerNorm(name="norm2")(x), text, bias)
        return x + blocks.FeedForward(self.ff_mult, self.dtype, name="ff")(blocks.LayerNorm(name="norm3")(x))


class TimeAfterSecondNorm(blocks.ResBlock):
    @nn.compact
    def __call__(self, x, time):
        inner = 2 * self.features
        y = nn.silu(blocks.GroupNorm(self.groups, self.eps, name="norm1")(x))
        y = blocks.GroupNorm(self.groups, self.eps, name="norm2")(
            blocks.SeparableConv(inner, self.dtype, name="conv1")(y)
        )
        y = y + blocks.Dense(inner, self.dtype, name="time_emb_proj")(nn.silu(time))[:, None, None, :]
        y = blocks.SeparableConv(self.features, self.dtype, name="conv2")(nn.silu(y))
        if x.shape[-1] != self.features:
            x = blocks.PointwiseConv(self.features, self.dtype, use_bias=True, name="conv_shortcut")(x)
        return x + y


class SwappedGEGLU(blocks.GEGLU):
    @nn.compact
    def __call__(self, x):
        gate, value = jnp.split(blocks.Dense(2 * self.inner, self.dtype, name="proj")(x), 2, -1)
        return value * blocks.gelu(gate)


class TextNormBeforeProjection(unet.TextProjection):
    @nn.compact
    def __call__(self, text):
        rms = jnp.sqrt(jnp.square(text).mean(-1, keepdims=True) + blocks.TOKEN_NORM_EPS)
        text = blocks.Dense(self.features, self.dtype, name="proj_0")(text / rms)
        return text * self.param("proj_1", lambda *_: None)["scale"][None, None, :]


class NormOverAllHeads(blocks.RMSNorm):
    """Of queries (b, n, k, d): the mean square over heads too."""

    @nn.compact
    def __call__(self, x):
        axes = (-1,) if x.ndim == 3 else (-2, -1)
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        y = x * jax.lax.rsqrt(jnp.square(x).mean(axes, keepdims=True) + blocks.TOKEN_NORM_EPS)
        return y * blocks.on_last_axis(scale, x)


def other_epsilon(norm: type[nn.Module], eps: float) -> type[nn.Module]:
    """`norm` with another epsilon in place of TOKEN_NORM_EPS."""

    class Wrong(norm):
        def __call__(self, x):
            right, blocks.TOKEN_NORM_EPS = blocks.TOKEN_NORM_EPS, eps
            try:
                return super().__call__(x)
            finally:
                blocks.TOKEN_NORM_EPS = right

    return Wrong


def numpy_of_jax(**changes) -> types.SimpleNamespace:
    """jax.numpy with some functions replaced, for one module."""
    return types.SimpleNamespace(**{**vars(jnp), **changes})


def sin_first(x, width):
    return jnp.roll(SINUSOID(x, width), width // 2, -1)


def shifted_divisor(x, width):
    half = width // 2
    angles = x[:, None] * jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - 1))[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


def tiled_keys(q, k, v, bias):
    """Query head i reads key head i mod g, not i // (heads / g)."""
    repeat = q.shape[2] // k.shape[2]
    return ATTEND(q, jnp.tile(k, (1, 1, repeat, 1)), jnp.tile(v, (1, 1, repeat, 1)), bias)


def transposed_kernels(params):
    def swap(path, leaf):
        return leaf.swapaxes(0, 1) if "depthwise" in jax.tree_util.keystr(path) else leaf

    return jax.tree_util.tree_map_with_path(swap, params)


SINUSOID, ATTEND = blocks.sinusoid, blocks.attend

PATCHES = {
    "1 residual around missing self-attention": (blocks, "TransformerBlock", ResidualAroundMissingAttention),
    "2 time after the second norm": (blocks, "ResBlock", TimeAfterSecondNorm),
    "3 entry norm eps 1e-5": (blocks, "ENTRY_NORM_EPS", 1e-5),
    "3 layer norm eps 1e-6": (blocks, "LayerNorm", other_epsilon(blocks.LayerNorm, 1e-6)),
    "3 q, k and text norm eps 1e-6": (blocks, "RMSNorm", other_epsilon(blocks.RMSNorm, 1e-6)),
    "4 q and k norm over all heads": (blocks, "RMSNorm", NormOverAllHeads),
    "5 GEGLU halves swapped": (blocks, "GEGLU", SwappedGEGLU),
    "5 tanh GELU": (blocks, "gelu", functools.partial(jax.nn.gelu, approximate=True)),
    "6 mask ignored": (blocks, "MASK_BIAS", 0.0),
    "6 mask with the wrong sign": (blocks, "MASK_BIAS", 10000.0),
    "6 text norm before its projection": (unet, "TextProjection", TextNormBeforeProjection),
    "7 sin before cos": (blocks, "sinusoid", sin_first),
    "7 divisor half - 1": (blocks, "sinusoid", shifted_divisor),
    "8 SAME padding": (blocks, "conv", same_padding_conv),
    "8 bilinear upsampling": (blocks, "upsample_nearest", bilinear),
    "8 skip first": (
        unet, "jnp", numpy_of_jax(concatenate=lambda arrays, axis: jnp.concatenate(arrays[::-1], axis)),
    ),
}  # fmt: skip
CONFIGS = {"3 res block eps 1e-6": {"norm_eps": 1e-6}, "4 no q and k norm": {"qk_norm": False}}
WRONG_INPUTS = {
    "7 timestep in 0..1": lambda x: dataclasses.replace(x, timestep=x.timestep / 1000),
    "7 height before width": lambda x: dataclasses.replace(x, time_ids=x.time_ids[:, ::-1].copy()),
    "7 sizes in latent pixels": lambda x: dataclasses.replace(x, time_ids=x.time_ids / 8),
}


@pytest.fixture(scope="module")
def control():
    """Inputs, the oracle's output and parameters; the check passes on them."""
    model, params = model_and_params(CONTROL)
    inputs = oracles.unet_inputs(CONTROL, *INPUTS["ragged batch"])
    theirs = oracles.torch_velocity(model, inputs)
    assert difference(velocity(CONTROL, params, inputs), theirs) <= SMALL_TOLERANCE
    return inputs, theirs, params


@pytest.mark.parametrize("name", PATCHES)
def test_a_wrong_network_is_caught(name, control, monkeypatch):
    inputs, theirs, params = control
    monkeypatch.setattr(*PATCHES[name])
    assert difference(velocity(CONTROL, params, inputs), theirs) > CAUGHT


@pytest.mark.parametrize("name", CONFIGS)
def test_a_wrong_config_is_caught(name, control):
    inputs, theirs, params = control
    config = dataclasses.replace(CONTROL, **CONFIGS[name])
    assert difference(velocity(config, params, inputs), theirs) > CAUGHT


@pytest.mark.parametrize("name", WRONG_INPUTS)
def test_wrong_inputs_are_caught(name, control):
    inputs, theirs, params = control
    assert difference(velocity(CONTROL, params, WRONG_INPUTS[name](inputs)), theirs) > CAUGHT


def test_transposed_depthwise_kernels_are_caught(control):
    inputs, theirs, params = control
    assert difference(velocity(CONTROL, transposed_kernels(params), inputs), theirs) > CAUGHT


def test_wrong_grouping_of_keys_is_caught(monkeypatch):
    config = dataclasses.replace(CONTROL, **LADDER["grouped keys"])
    model, params = model_and_params(config)
    inputs = oracles.unet_inputs(config, *INPUTS["ragged batch"])
    monkeypatch.setattr(blocks, "attend", tiled_keys)
    assert difference(velocity(config, params, inputs), oracles.torch_velocity(model, inputs)) > CAUGHT


# --- full size


@pytest.fixture(scope="module")
def full():
    model = oracles.torch_unet(UNetConfig(), sensitive=False)
    return model, jax.tree.map(jnp.asarray, oracles.flax_params(model, "unet", UNetConfig()))


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_INPUTS)
def test_full_network_equals_diffusers(name, full):
    model, params = full
    inputs = oracles.unet_inputs(UNetConfig(), *FULL_INPUTS[name])
    theirs = oracles.torch_velocity(model, inputs)
    assert theirs.std() > 0.1
    error = difference(compiled_velocity(UNetConfig(), params, inputs), theirs)
    print(f"{name}: largest difference {error:.1e}, output std {theirs.std():.2f}")
    assert error <= FULL_TOLERANCE


@pytest.mark.parametrize("groups", [1, 2])
def test_attention_in_bfloat16_keeps_its_scores(groups):
    """Scores near 60 would be 0.25 apart if they were rounded before the softmax."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(scale * rng.normal(size=(1, 32, heads, 16)), jnp.bfloat16)
               for heads, scale in ((4, 8), (groups, 8), (groups, 1)))  # fmt: skip
    exact = np.asarray(blocks.attend(*(x.astype(jnp.float32) for x in (q, k, v)), None))
    found = np.asarray(blocks.attend(q, k, v, None).astype(jnp.float32))
    assert np.abs(found - exact).max() < 0.02  # 0.13 to 0.23 with rounded scores
