"""The table of rules beside the real GPU accelerator, on graphs that are right and on known traps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conversion import delegates, litert
from conversion.graph import Graph, Port
from conversion.graph_ops import Node, embedding_lookup, group_norm, half_safe, layer_norm

needs_gpu = pytest.mark.skipif(delegates.gpu_environment() is None, reason="no Vulkan driver for the GPU accelerator")

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def heads(x):
    return x.reshape(1, 16, 4, 8).transpose(0, 2, 1, 3)


def norms(p, x):
    return layer_norm(Node("ln", p), group_norm(Node("gn", p), x, 8, 1e-5).reshape(1, 32, 32))


TABLE = {"table": normal(128, 32), "offset": normal(16, 32), "scale": normal(32), "bias": normal(32)}
# name: (does a GPU run it rightly, weights, input shapes, function)
GRAPHS = {
    "norms": (
        True,
        TABLE,
        [(1, 4, 8, 32)],
        norms,
    ),
    "norms_for_half": (True, TABLE, [(1, 4, 8, 32)], half_safe(True)(norms)),
    "folded_heads": (
        True,
        {},
        [(1, 64, 8), (1, 24, 8)],
        lambda p, q, k: jax.lax.dot_general(q, k, (((2,), (2,)), ((0,), (0,)))),
    ),
    "equal_heads": (True, {}, [(1, 16, 32), (1, 16, 32)], lambda p, q, k: heads(q) @ heads(k).transpose(0, 1, 3, 2)),
    "table_in_four_dimensions": (
        True,
        TABLE,
        [("token_ids", (1, 16))],
        lambda p, ids: (
            embedding_lookup(ids.reshape(16), p["table"]).reshape(1, 16, 1, 32) + p["offset"].reshape(1, 16, 1, 32)
        ),
    ),
    # Known traps.
    "broadcast_key_head": (
        False,
        {},
        [(1, 4, 32, 8), (1, 1, 24, 8)],
        lambda p, q, k: jnp.einsum("bhnd,bkmd->bhnm", q, k),
    ),
    "constant_of_two_dimensions": (False, TABLE, [(16, 32)], lambda p, x: x + p["offset"]),
    "gather": (
        False,
        TABLE,
        [("token_ids", (1, 16))],
        lambda p, ids: p["table"].at[ids].get(mode="promise_in_bounds", wrap_negative_indices=False),
    ),
    "five_dimensions": (
        False,
        {},
        [(2, 4, 8)],
        lambda p, x: jnp.tanh(x.reshape(2, 2, 2, 2, 4).transpose(4, 3, 2, 1, 0)).reshape(4, 16),
    ),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs")
    for name, (_, weights, inputs, function) in GRAPHS.items():
        ports = tuple(
            Port(i[0], i[1], "int32", "", 128) if isinstance(i[0], str) else Port(f"x{k}", i, "float32", "")
            for k, i in enumerate(inputs)
        )
        shapes = [jax.ShapeDtypeStruct(port.shape, port.dtype) for port in ports]
        out = jax.eval_shape(function, jax.tree.map(jnp.asarray, weights), *shapes)
        graph = Graph("unet", ports, Port("y", out.shape, "float32", ""), weights, function)
        litert.convert(graph, folder / f"{name}.tflite", {"recipe": "fp32"})
    return folder


@pytest.mark.parametrize("name", GRAPHS)
def test_the_rules_know_right_from_wrong(files, name):
    verdict = delegates.by_rules(files / f"{name}.tflite", "gpu")
    assert verdict.whole == GRAPHS[name][0], verdict
    assert verdict.whole or verdict.refused


@needs_gpu
@pytest.mark.parametrize("name", GRAPHS)
def test_the_rules_agree_with_the_accelerator(files, name):
    verdict = delegates.on_gpu(files / f"{name}.tflite", timeout_sec=300)
    assert verdict.how == "accelerator"
    assert verdict.whole == GRAPHS[name][0], verdict


@needs_gpu
def test_the_accelerator_takes_the_unet_whole_and_rightly(litert_model):
    verdict = delegates.on_gpu(litert_model / "unet.tflite", timeout_sec=300)
    assert verdict.whole and verdict.difference < 1e-3, verdict


def test_every_component_runs_whole_by_the_rules(litert_model, capsys):
    found = {}
    for path in sorted(litert_model.glob("*.tflite")):
        found[path.stem] = [delegates.by_rules(path, delegate) for delegate in ("cpu", "gpu", "npu")]
        assert all(verdict.whole for verdict in found[path.stem]), found[path.stem]
    assert "runs whole on: cpu (rules), gpu (rules), npu (rules)" in delegates.table(found)


def test_what_falls_back_is_named_with_its_layer(files):
    verdict = delegates.by_rules(files / "gather.tflite", "gpu")
    assert "GATHER_ND is not taken" in verdict.refused[0]
    assert "nothing" in delegates.table({"text": [verdict]})
