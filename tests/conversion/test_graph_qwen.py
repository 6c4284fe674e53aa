"""The text tower of Qwen3-VL in export form against the flax module."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from litert_models import small_config

from conversion import audit, graph, litert, onnx, parity, to_onnx
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


STATES = {"before_norm": False, "after_norm": True}  # and whether the tower has its final norm


def tower_of(state: str) -> TextTowerConfig:
    return dataclasses.replace(TOWER, final_norm=STATES[state])


@pytest.fixture(scope="module")
def case():
    """(parameters, chats padded at the end, their mask, states that the flax module gives by `TextConfig.state`)."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, TOWER.vocab_size, (2, DROPPED + KEPT)).astype(np.int32)
    mask = np.ones(ids.shape, np.int32)
    mask[1, -5:] = 0
    positions = jnp.asarray(rope.text_positions(mask))
    x = jnp.zeros((1, 1, TOWER.hidden_size))
    params = TextTower(TOWER).init(jax.random.key(1), x, positions[:, :1, :1], jnp.ones((1, 1)))["params"]
    params["embed_tokens"] = {"embedding": jnp.asarray(rng.standard_normal((60, 32)), jnp.float32)}
    params = jax.tree.map(lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape).astype(np.float32), params)
    inputs = (params["embed_tokens"]["embedding"][ids], positions, jnp.asarray(mask))
    wanted = {
        state: np.asarray(TextTower(tower_of(state)).apply({"params": params}, *inputs))[:, DROPPED:]
        for state in STATES
    }
    return params, ids, mask[:, DROPPED:, None], wanted


def built(params, state="before_norm", **sizes):
    params = jax.tree.map(np.array, params)
    return graph.build("text", CONFIG, params, dataclasses.replace(SIZES, **sizes), tower_of(state))


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("half_safe", [False, True])
def test_the_tower_keeps_its_numbers(case, half_safe, state):
    params, ids, kept, wanted = case
    tower = built(params, state, half_safe=half_safe)
    assert ("norm" in tower.params) == STATES[state]
    found = np.asarray(jax.jit(tower.apply)(tower.params, ids))
    assert found.shape == tower.output.shape == (2, KEPT, TOWER.hidden_size)
    assert np.abs(wanted[state]).max() > 1
    differences = {name: np.abs((found - states) * kept).max() for name, states in wanted.items()}
    assert differences.pop(state) <= 2e-5
    assert min(differences.values()) > 1e-1  # negative control: the state on the other side of the norm


def test_exchanged_query_heads_are_seen(case):
    """Negative control: the order of the rows that share a key head matters."""
    params, ids, kept, wanted = case
    tower = built(params)
    kernel = tower.params["layers_0"]["self_attn"]["q_proj"]["kernel"]
    tower.params["layers_0"]["self_attn"]["q_proj"]["kernel"] = np.roll(kernel, TOWER.head_dim, axis=0)
    found = np.asarray(jax.jit(tower.apply)(tower.params, ids))
    assert np.abs((found - wanted["before_norm"]) * kept).max() > 1e-3


@pytest.mark.parametrize("state", STATES)
def test_the_files_have_builtin_operations_alone_and_the_same_numbers(case, tmp_path, state):
    """Both formats; each misses the floor of the export beside the other state."""
    from conversion.runtime import load_component

    params, ids, kept, wanted = case
    litert.convert(built(params, state), tmp_path / "text.tflite", {"recipe": "fp32"})
    assert audit.audit(tmp_path / "text.tflite").faults == ()
    run = load_component(tmp_path, {"files": {"text": "text.tflite"}}, "text", 1)
    onnx.export(built(params, state), tmp_path / "text.onnx")
    for found in (run(token_ids=ids), to_onnx.opened(tmp_path / "text.onnx")(token_ids=ids)):
        for name, states in wanted.items():
            floor = parity.FLOORS["fp32"]
            measured = parity.measure([states * kept], [found * kept], floor)
            print(f"{state} file beside {name}: max abs {measured.max_abs:.1e} of {measured.peak:.1f}")
            assert measured.passed == (name == state)


def test_another_tower_is_refused(case):
    with pytest.raises(UserError, match="queries and keys"):
        graph.build("text", CONFIG, {}, SIZES, dataclasses.replace(TOWER, qk_norm=False, qkv_bias=True))
