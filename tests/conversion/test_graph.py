"""The export form against the flax modules: the same weights, the same numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from litert_models import random_params, small_config

from conversion import audit, graph, litert, parity
from conversion.graph import Sizes
from dreamlite_jax.config import VAEConfig
from dreamlite_jax.errors import UserError
from dreamlite_jax.models import minilm

SIZES = Sizes(height=32, width=48, text_length=12)
UNETS = {
    "released": {},
    "multi_head": dict(num_kv_heads=None, separable_convs=False, down_blocks=("plain", "cross")),
    "grouped": dict(num_kv_heads=2, qk_norm=False, mid_layers=2, up_blocks=("cross", "self_cross")),
    "channel": dict(condition_layout="channel", in_channels=8, layers_per_block=2),
}


def outputs(config, params, sizes=SIZES, component="unet"):
    """(flax, export form) on one random input."""
    case = parity.case(component, config, sizes, 0, seed=0)
    wanted = parity.reference(component, config, params)(*case.model)
    built = graph.build(component, config, jax.tree.map(np.array, params), sizes)
    found = jax.jit(built.apply)(built.params, *(case.graph[port.name] for port in built.inputs))
    assert [case.graph[port.name].shape for port in built.inputs] == [port.shape for port in built.inputs]
    assert found.shape == built.output.shape
    return wanted, np.asarray(found)


@pytest.mark.parametrize("name", UNETS)
def test_unet_of_every_kind_of_config(name):
    config = small_config(**UNETS[name])
    wanted, found = outputs(config, random_params(config, "unet"))
    assert np.abs(wanted).max() > 0.5
    assert np.abs(wanted - found).max() <= 2e-5


def test_batch_and_chunked_attention_change_no_number():
    config = small_config()
    params = random_params(config, "unet")
    sizes = Sizes(height=32, width=48, text_length=12, batch=2, attention_chunk=13)
    wanted, found = outputs(config, params, sizes)
    assert wanted.shape[0] == 2
    assert np.abs(wanted - found).max() <= 2e-5


def test_exchanged_halves_of_the_gated_layer_are_seen():
    """Negative control of the parity above."""
    config = small_config()
    params = random_params(config, "unet")
    wanted, _ = outputs(config, params)
    gate = params["mid_block"]["attentions_0"]["transformer_blocks_0"]["ff"]["net_0"]["proj"]
    gate["kernel"] = np.roll(gate["kernel"], gate["kernel"].shape[1] // 2, axis=1)
    _, found = outputs(config, params)
    assert np.abs(wanted - found).max() > 1e-3


@pytest.mark.parametrize("component", ["vae_encoder", "vae_decoder"])
def test_autoencoder(component):
    config = small_config()
    wanted, found = outputs(config, random_params(config, "vae"), component=component)
    assert np.abs(wanted - found).max() <= 2e-5 * max(1.0, np.abs(wanted).max())


def test_every_operation_is_named_after_its_layer():
    config = small_config()
    built = graph.build("unet", config, random_params(config, "unet"), SIZES)
    shapes = [jax.ShapeDtypeStruct(port.shape, port.dtype) for port in built.inputs]
    text = jax.jit(built.apply).lower(built.params, *shapes).as_text(debug_info=True)
    assert "mid_block/attentions_0/transformer_blocks_0/attn1/to_q" in text


@pytest.mark.parametrize(
    "sizes, named",
    [
        (Sizes(40, 32, 12), "height 40"),
        (Sizes(32, 0, 12), "width 0"),
        (Sizes(32, 32, 49), "text_length is 49"),
        (Sizes(32, 32, 12, batch=0), "batch is 0"),
        (Sizes(32, 32, 12, attention_chunk=-1), "attention_chunk is -1"),
    ],
)
def test_a_shape_the_network_cannot_take_is_refused(sizes, named):
    config = small_config()
    with pytest.raises(UserError, match=named):
        graph.build("unet", config, {}, sizes)


def test_text_encoder():
    small = minilm.MiniLMConfig(vocab_size=50, hidden_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = small_config()
    ids = jnp.zeros((1, 12), jnp.int32)
    params = minilm.MiniLM(small).init(jax.random.key(0), ids, jnp.ones((1, 12)))["params"]
    case = parity.case("text", config, SIZES, small.vocab_size, seed=0)
    wanted = minilm.MiniLM(small).apply({"params": params}, *map(jnp.asarray, case.model))
    built = graph.build("text", config, jax.tree.map(np.array, params), SIZES, small)
    found = built.apply(built.params, case.graph["token_ids"], case.graph["text_bias"])
    assert np.abs(np.asarray(wanted - found)).max() <= 2e-5


def test_a_wide_decoder_computes_no_weights(tmp_path):
    """The converter folds only small constants by itself, so a narrow network would not show it."""
    wide = VAEConfig(width=128, encoder_blocks=(0, 0, 0), decoder_blocks=(0, 0, 0))
    config = dataclasses.replace(small_config(), vae=wide)
    built = graph.build("vae_decoder", config, random_params(config, "vae"), Sizes(32, 32, 12))
    litert.convert(built, tmp_path / "vae_decoder.tflite", {"component": "vae_decoder"})
    assert audit.audit(tmp_path / "vae_decoder.tflite").faults == ()
