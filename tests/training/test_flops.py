"""FLOPs counted from the config: against the figures measured of the released model, and against the traced program."""

import jax
import numpy as np
import pytest
import tiny

from dreamlite_jax.config import UNetConfig
from dreamlite_jax.models import blocks
from dreamlite_jax.models.unet import UNet, dummy_inputs
from dreamlite_jax.training import flops
from dreamlite_jax.training.config import load_config


@pytest.mark.parametrize(("h", "w", "giga"), [(32, 32, 81.5), (64, 64, 318), (128, 128, 1329), (128, 256, 2835)])
def test_of_the_released_model_as_measured(h, w, giga):
    """FLOPs of the oracle's forward pass at text length 128, counted by running it (specification, section 1)."""
    assert flops.unet_flops(UNetConfig(), h, w, 128) / 1e9 == pytest.approx(giga, rel=2e-3)


def counted(jaxpr) -> float:
    """FLOPs of the matrix products and convolutions of a traced program, sub-programs included."""
    total = 0.0
    for equation in jaxpr.eqns:
        shapes = [v.aval.shape for v in equation.invars]
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += 2.0 * np.prod(equation.outvars[0].aval.shape) * np.prod([shapes[0][i] for i in contracted])
        elif equation.primitive.name == "conv_general_dilated":
            out_axis = equation.params["dimension_numbers"].rhs_spec[0]
            total += 2.0 * np.prod(equation.outvars[0].aval.shape) * np.prod(shapes[1]) / shapes[1][out_axis]
        for value in equation.params.values():
            if inner := getattr(value, "jaxpr", value if hasattr(value, "eqns") else None):
                total += counted(inner)
    return total


WIDE = {"block_out_channels": (8, 16), "num_heads": (2, 4), "norm_groups": 4, "cross_attention_dim": 12, "text_dim": 20}
CONFIGS = {
    "tiny": tiny.CONFIG.unet,
    "released blocks": UNetConfig(
        **WIDE, layers_per_block=2, transformer_layers=(1, 2), down_blocks=("cross", "self_cross"),
        up_blocks=("self_cross", "plain"), size_embed_dim=6,
    ),
    "full convolutions, many key heads": UNetConfig(
        **WIDE, layers_per_block=1, transformer_layers=(2, 1), down_blocks=("self_cross", "plain"),
        up_blocks=("cross", "self_cross"), separable_convs=False, num_kv_heads=None, mid_layers=2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_as_the_traced_program_has_them(config, monkeypatch):
    monkeypatch.setattr(blocks, "depthwise_conv3x3", blocks._grouped_conv3x3)  # products of shifted views on CPU
    height, width, text = 4 * config.size_multiple, 2 * config.size_multiple, 5
    inputs = dummy_inputs(config, height, width, text)
    variables = jax.eval_shape(UNet(config).init, jax.random.key(0), *inputs)
    traced = counted(jax.make_jaxpr(UNet(config).apply)(variables, *inputs).jaxpr)
    assert flops.unet_flops(config, height, inputs[0].shape[2], text) == pytest.approx(traced, rel=1e-9)


def test_recomputation_costs_as_much_as_it_forgets(monkeypatch):
    """Products in the gradient's program: fewest with everything kept, most with nothing kept."""
    monkeypatch.setattr(blocks, "depthwise_conv3x3", blocks._grouped_conv3x3)
    config, inputs = CONFIGS["released blocks"], dummy_inputs(CONFIGS["released blocks"])
    variables = jax.eval_shape(UNet(config).init, jax.random.key(0), *inputs)

    def work(**options) -> float:
        network = UNet(config, **options)
        gradient = jax.grad(lambda variables: network.apply(variables, *inputs).sum())
        return counted(jax.make_jaxpr(gradient)(variables).jaxpr)

    kept, products, nothing = work(), work(remat=True, remat_keep="matmuls"), work(remat=True)
    assert kept < products < nothing < 2 * kept


def test_a_step_is_three_forward_passes_an_item():
    config = load_config("configs/quickstart.py:joint").model.unet
    one = flops.unet_flops(config, 8, 16, 32)
    assert flops.training_flops(config, 7, 8, 16, 32) == pytest.approx(21 * one)
    assert flops.peak("TPU v5 lite") == 197e12 and flops.peak("cpu") is None
