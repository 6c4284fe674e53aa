"""The same graphs as ONNX, run by onnxruntime beside the flax modules."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from litert_models import random_params, small_config

from conversion import exports, graph, graph_ops, litert, onnx, parity, resources, text_parts, to_onnx
from conversion.graph import Sizes
from conversion.onnx_session import open_session
from conversion.runtime import FORMAT
from dreamlite_jax.config import TextConfig
from dreamlite_jax.errors import UserError

SIZES = Sizes(32, 32, 12)


@pytest.fixture(scope="module")
def unet():
    """(case, output of the flax module, graph)."""
    config = small_config()
    params = random_params(config, "unet")
    case = parity.case("unet", config, SIZES, 0, seed=0)
    wanted = parity.reference("unet", config, params)(*case.model)
    return case, wanted, graph.build("unet", config, jax.tree.map(np.array, params), SIZES)


def run(unet, path, **options):
    case, wanted, built = unet
    onnx.export(built, path, **options)
    (found,) = open_session(path, threads=1).run(None, case.graph)
    return parity.measure([wanted], [found], parity.FLOORS[options.get("precision", "fp32")])


@pytest.mark.parametrize("opset", onnx.OPSETS)
def test_the_numbers_and_the_standard_nodes_of_an_opset(unet, tmp_path, opset):
    assert run(unet, tmp_path / "unet.onnx", opset=opset).passed
    found = to_onnx.count_operations(tmp_path / "unet.onnx")
    assert found["LayerNormalization"] == 15  # three in each of five blocks
    assert ("InstanceNormalization" in found) == (opset >= onnx.SINCE["native.group_norm"])
    assert "GroupNormalization" not in found
    assert ("RMSNormalization" in found) == (opset >= onnx.SINCE["native.rms_norm"])
    assert "Einsum" not in found


def group_normed(path, opset, mean):
    """(float64, onnxruntime) of a group norm of channels whose mean is `mean` deviations."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 6, 10, 12)).astype(np.float32) + np.float32(mean)
    scale, bias = rng.standard_normal((2, 12)).astype(np.float32)
    ports = [graph.Port(name, x.shape, "float32", "") for name in ("x", "y")]
    params = {"scale": scale, "bias": bias}
    built = graph.Graph(
        "unet", ports[:1], ports[1], params, lambda p, x: graph_ops.group_norm(graph_ops.Node("norm", p), x, 3, 1e-5)
    )
    onnx.export(built, path, opset=opset)
    y = x.astype(np.float64).reshape(2, 60, 3, 4)
    y = (y - y.mean((1, 3), keepdims=True)) / np.sqrt(y.var((1, 3), keepdims=True) + 1e-5)
    return y.reshape(x.shape) * scale + bias, open_session(path, threads=1).run(None, {"x": x})[0]


# At a mean of 1,000 float32 itself keeps 6e-5 of a deviation.
@pytest.mark.parametrize("opset", [17, 20, 21, 22, 23])
@pytest.mark.parametrize("mean, most", [(0, 2e-6), (-10, 1e-5), (100, 1e-4), (1000, 1e-3), (-4000, 4e-3)])
def test_a_group_norm_keeps_its_digits_at_large_means(tmp_path, opset, mean, most):
    wanted, found = group_normed(tmp_path / "norm.onnx", opset, mean)
    assert np.abs(found - wanted).max() <= most


def test_the_single_node_loses_them(tmp_path, monkeypatch):
    """Control: why there is no GroupNormalization here. When it passes, onnxruntime has been mended."""

    def one_node(self, x, scale, bias, groups, epsilon):
        names = [self.nhwc(scale), self.nhwc(bias)]
        out = self.node("GroupNormalization", [self.nchw(x), *names], epsilon=epsilon, num_groups=groups)
        return onnx.Value(x.shape, nchw=out)

    monkeypatch.setattr(onnx._Writer, "_group_norm", one_node)
    wanted, found = group_normed(tmp_path / "norm.onnx", 21, 1000)
    assert not np.abs(found - wanted).max() <= 0.1


def test_half_precision_reaches_its_floor_and_not_that_of_float32(unet, tmp_path):
    found = run(unet, tmp_path / "unet.onnx", precision="fp16")
    assert found.passed
    assert found.relative_rms > parity.FLOORS["fp32"].relative_rms  # the floor of fp32 would see it: a control


def test_large_weights_lie_beside_the_file(unet, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "EXTERNAL_BYTES", 1000)
    assert run(unet, tmp_path / "unet.onnx").passed
    assert (tmp_path / "unet.onnx.data").stat().st_size > 0.9 * unet[2].weight_bytes


def test_other_weights_miss_the_floor(unet, tmp_path):
    """Negative control."""
    built = unet[2]
    built.params["conv_out"]["bias"] += np.float32(1e-3)
    found = run(unet, tmp_path / "unet.onnx")
    built.params["conv_out"]["bias"] -= np.float32(1e-3)
    assert not found.passed


def test_the_command_converts_every_component(small_model, tmp_path, capsys):
    output = tmp_path / "out"
    flags = ["--text_length", "12", "--precision", "fp16", "--opset", "17"]
    assert to_onnx.main(["--model", str(small_model), "--output", str(output), *flags]) == 0
    report = json.loads((output / "report.json").read_text())
    assert set(report["components"]) == {"unet", "vae_encoder", "vae_decoder", "text"}
    assert report["passed"] and (output / "tokenizer.json").is_file()
    # Before operator set 23 some norms are no single nodes: their squares have to be kept within half precision.
    assert report["components"]["unet"]["ops"]["Abs"] > 0
    manifest = json.loads((output / "model.json").read_text())
    assert manifest["files"]["unet"] == "unet.onnx" and manifest["sizes"]["text_length"] == 12
    assert {"config", "templates", "mask_bias", "pad_id", "precision"} <= set(manifest)
    assert manifest["format"] not in (FORMAT, None)  # the LiteRT runtime refuses it
    assert "all floors reached" in capsys.readouterr().out


def test_billions_of_weights_stay_outside_where_a_file_or_the_memory_is_too_small(small_model, monkeypatch, capsys):
    config = dataclasses.replace(small_config(), text=TextConfig(encoder="qwen3_vl"))
    monkeypatch.setattr(text_parts, "present", lambda *_: True)
    monkeypatch.setattr(resources, "available_memory", lambda: 10**11)
    monkeypatch.setattr(text_parts, "weight_bytes", lambda *_: 7 * 10**9)
    args = to_onnx.parse(["--model", str(small_model), "--output", "out"])
    assert exports.components_of(args, small_model, config) == graph.COMPONENTS
    assert "text" not in exports.components_of(args, small_model, config, litert.LARGEST_FILE)
    assert "too much for one file" in capsys.readouterr().err
    monkeypatch.setattr(resources, "available_memory", lambda: 10**10)
    assert "text" not in exports.components_of(args, small_model, config)
    assert "too much for 10.0 GB of memory" in capsys.readouterr().err


def test_what_cannot_work_is_refused_before_any_work(small_model, tmp_path, monkeypatch):
    monkeypatch.setattr(exports, "load", None)
    broken = shutil.copytree(small_model, tmp_path / "broken")
    (broken / "vae.safetensors").unlink()
    for model, flags, named in (
        (small_model, ["--opset", "16"], "opset is 16"),
        (broken, [], r"lacks vae\.safetensors"),
        (small_model, ["--output", str(broken / "model.json" / "below")], r"model\.json is a file"),
    ):
        with pytest.raises(UserError, match=named):
            to_onnx.main(["--model", str(model), "--output", str(tmp_path / "out"), *flags])
    monkeypatch.setattr(resources, "available_memory", lambda: 10**8)
    with pytest.raises(UserError, match=r"0\.1 GB are free"):
        to_onnx.main(["--model", str(small_model), "--output", str(tmp_path / "out")])
