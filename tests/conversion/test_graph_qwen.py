"""The text tower of Qwen3-VL in export form against the flax module."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from litert_models import small_config

from conversion import audit, graph, litert
from conversion.graph import Sizes
from dreamlite_jax.config import TextConfig
from dreamlite_jax.errors import UserError
from dreamlite_jax.models.qwen_vl import rope
from dreamlite_jax.models.qwen_vl.config import TextTowerConfig
from dreamlite_jax.models.qwen_vl.text import TextTower

TOWER = TextTowerConfig(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope_theta=5e6,
    mrope_section=(2, 1, 1),
)
CONFIG = dataclasses.replace(small_config(), text=TextConfig(encoder="qwen3_vl", max_length=48))
DROPPED, KEPT = 34, 12
SIZES = Sizes(32, 32, KEPT, batch=2)


@pytest.fixture(scope="module")
def case():
    """(parameters, chats padded at the end, their mask, states that the flax module gives)."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, TOWER.vocab_size, (2, DROPPED + KEPT)).astype(np.int32)
    mask = np.ones(ids.shape, np.int32)
    mask[1, -5:] = 0
    tower = TextTower(TOWER)
    positions = jnp.asarray(rope.text_positions(mask))
    x = jnp.zeros((1, 1, TOWER.hidden_size))
    params = tower.init(jax.random.key(1), x, positions[:, :1, :1], jnp.ones((1, 1)))["params"]
    params["embed_tokens"] = {"embedding": jnp.asarray(rng.standard_normal((60, 32)), jnp.float32)}
    params = jax.tree.map(lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape).astype(np.float32), params)
    states = tower.apply({"params": params}, params["embed_tokens"]["embedding"][ids], positions, jnp.asarray(mask))
    return params, ids, mask[:, DROPPED:, None], np.asarray(states)[:, DROPPED:]


def built(params, **sizes):
    params = jax.tree.map(np.array, params)
    return graph.build("text", CONFIG, params, dataclasses.replace(SIZES, **sizes), TOWER)


@pytest.mark.parametrize("half_safe", [False, True])
def test_the_tower_keeps_its_numbers(case, half_safe):
    params, ids, kept, wanted = case
    tower = built(params, half_safe=half_safe)
    found = np.asarray(jax.jit(tower.apply)(tower.params, ids))
    assert found.shape == tower.output.shape == (2, KEPT, TOWER.hidden_size)
    assert np.abs(wanted).max() > 1
    assert np.abs((found - wanted) * kept).max() <= 2e-5


def test_exchanged_query_heads_are_seen(case):
    """Negative control: the order of the rows that share a key head matters."""
    params, ids, kept, wanted = case
    tower = built(params)
    kernel = tower.params["layers_0"]["self_attn"]["q_proj"]["kernel"]
    tower.params["layers_0"]["self_attn"]["q_proj"]["kernel"] = np.roll(kernel, TOWER.head_dim, axis=0)
    found = np.asarray(jax.jit(tower.apply)(tower.params, ids))
    assert np.abs((found - wanted) * kept).max() > 1e-3


def test_the_file_has_builtin_operations_alone_and_the_same_numbers(case, tmp_path):
    from conversion.runtime import load_component

    params, ids, kept, wanted = case
    litert.convert(built(params), tmp_path / "text.tflite", {"recipe": "fp32"})
    assert audit.audit(tmp_path / "text.tflite").faults == ()
    run = load_component(tmp_path, {"files": {"text": "text.tflite"}}, "text", 1)
    assert np.abs((run(token_ids=ids) - wanted) * kept).max() <= 2e-5


def test_another_tower_is_refused(case):
    with pytest.raises(UserError, match="queries and keys"):
        graph.build("text", CONFIG, {}, SIZES, dataclasses.replace(TOWER, qk_norm=False, qkv_bias=True))
