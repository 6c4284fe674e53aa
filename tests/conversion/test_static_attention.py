"""int8_static and attention: probabilities times values stay in float, whatever the operation is called."""

import numpy as np
import pytest

from conversion import audit, graph_ops, litert, quantize
from conversion.graph import Graph, Port
from conversion.graph_ops import Node
from conversion.runtime import load_component

ROWS, WIDTH = 16, 32


def attention(path, keys, ends="dense", chunk=0):
    """A file with one attention; its last operation is a dense layer, a reshape or the product itself."""
    shapes = {"q": (1, ROWS, WIDTH), "k": (1, keys, WIDTH), "v": (1, keys, WIDTH)}
    inputs = tuple(Port(name, shape, "float32", "") for name, shape in shapes.items())
    eye = {"kernel": np.eye(WIDTH, dtype=np.float32)}

    def apply(params, q, k, v):
        y = graph_ops.attend(graph_ops.dense(Node("to_q", params["to_q"]), q), k, v, None, chunk)
        if ends == "dense":
            y = graph_ops.dense(Node("to_out", params["to_out"]), y)
        return y.reshape(1, ROWS * WIDTH) if ends == "reshape" else y

    output = Port("y", (1, ROWS * WIDTH) if ends == "reshape" else (1, ROWS, WIDTH), "float32", "")
    litert.convert(Graph("unet", inputs, output, {"to_q": eye, "to_out": eye}, apply), path, {})
    return path


def samples(path, keys, count=2):
    """Queries that look at all keys alike, but for the first, which is sure of one."""
    found = quantize.Samples()
    run = load_component(path.parent, {"files": {"it": path.name}}, "it", 1)
    for seed in range(count):
        rng = np.random.default_rng(seed)
        q, k, v = (rng.standard_normal((1, n, WIDTH)).astype(np.float32) for n in (ROWS, keys, keys))
        q /= 8
        q[0, 0] = k[0, 5]
        found.inputs.append({"q": q, "k": k, "v": v + 1})
        found.outputs.append(run(**found.inputs[-1]))
    return found


def lost(path, tmp_path, keys):
    """Relative RMS of the queries that are not sure; the worst sample counts."""
    seen, target = samples(path, keys), tmp_path / "static.tflite"
    quantize.quantize(path, target, "unet", "int8_static", seen, seen)
    run = load_component(tmp_path, {"files": {"it": target.name}}, "it", 1)
    pairs = [(run(**x)[:, 1:], y[:, 1:]) for x, y in zip(seen.inputs, seen.outputs, strict=True)]
    return max(np.sqrt(np.square(a - b).mean() / np.square(b).mean()) for a, b in pairs)


@pytest.mark.parametrize("keys", [100, 512, 1024, 2048])
def test_a_sure_query_takes_nothing_from_the_others(tmp_path, keys):
    path = attention(tmp_path / "attention.tflite", keys)
    assert lost(path, tmp_path, keys) < 0.05


def test_in_8_bits_it_does(tmp_path, monkeypatch):
    """Control: the same without the rule."""
    path = attention(tmp_path / "attention.tflite", 1024)
    monkeypatch.setattr(quantize, "kept_operations", lambda _: [])
    assert lost(path, tmp_path, 1024) > 0.2


@pytest.mark.parametrize("ends, chunk", [("dense", 0), ("dense", 5), ("reshape", 0), ("product", 0), ("product", 7)])
def test_the_product_is_found_by_what_it_reads(tmp_path, ends, chunk):
    """The operation that makes the output of a file is named after it, and not after its layer."""
    path = attention(tmp_path / "attention.tflite", 64, ends, chunk)
    seen, target = samples(path, 64), tmp_path / "static.tflite"
    quantize.quantize(path, target, "unet", "int8_static", seen, seen)
    ops = [op for op in audit.operations(target) if op.kind == "BATCH_MATMUL"]
    kinds = [{tensor.dtype for tensor in op.inputs[:2]} for op in ops]
    softmaxes = sum(op.kind == "SOFTMAX" for op in audit.operations(path))
    assert softmaxes == (1 if not chunk else -(-ROWS // chunk))
    assert kinds.count({"INT8"}) == softmaxes  # the scores
    assert kinds.count({"FLOAT32"}) == len(ops) - softmaxes >= 1


@pytest.mark.parametrize("ends", ["dense", "product"])
@pytest.mark.parametrize("chunk", [1, 5, 8])
def test_chunks_of_attention_are_never_joined(tmp_path, ends, chunk):
    """Scores and probabilities of all rows are not in memory together, as --attention_chunk promises."""
    widest = {}
    for rows in (0, chunk):
        path = attention(tmp_path / f"{rows}.tflite", 64, ends, rows)
        shapes = [tensor.shape for op in audit.operations(path) for tensor in op.outputs]
        widest[rows] = max(
            shape[1] for shape in shapes if shape[-1] == 64 and shape[1] != WIDTH
        )  # but for the keys, turned round
    assert widest == {0: ROWS, chunk: chunk}


def test_every_softmax_of_the_unet_has_its_product(litert_model):
    ops = list(audit.operations(litert_model / "unet.tflite"))
    kept = [op for op in quantize.kept_operations(litert_model / "unet.tflite") if op.kind == "BATCH_MATMUL"]
    products = sum(op.kind == "BATCH_MATMUL" for op in ops)
    assert len(kept) == sum(op.kind == "SOFTMAX" for op in ops) == products / 2 > 5


def test_a_rule_that_misses_is_an_error(tmp_path, monkeypatch):
    path = attention(tmp_path / "attention.tflite", 64)
    seen = samples(path, 64)
    monkeypatch.setattr(quantize, "_keep", lambda *_: None)
    with pytest.raises(RuntimeError, match="was to stay in float and did not"):
        quantize.quantize(path, tmp_path / "static.tflite", "unet", "int8_static", seen, seen)


@pytest.mark.parametrize("normalise", [lambda s: s / 64, lambda s: np.float32(0.5) * (s + s * s)])
def test_attention_that_is_not_recognised_is_an_error(tmp_path, normalise):
    ports = [Port(name, (1, 8, 8), "float32", "") for name in "qkvy"]

    def apply(params, q, k, v):
        return normalise(q @ k.transpose(0, 2, 1)) @ v + params["b"]

    path = tmp_path / "linear.tflite"
    bias = {"b": np.ones((1, 8, 8), np.float32)}
    litert.convert(Graph("unet", tuple(ports[:3]), ports[3], bias, apply), path, {})
    with pytest.raises(RuntimeError, match=r"the product of activations in .* neither leads"):
        quantize.kept_operations(path)
