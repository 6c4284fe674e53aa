"""SavedModels by jax2tf, and TensorFlow's converter as a cross-check of ours: the same products, the same numbers.

What runs TensorFlow needs the extra [tensorflow], which the extra of tests leaves out: 1.3 GB.
"""

import dataclasses
import importlib.util
import json
import sys

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from litert_models import random_params

from conversion import apart, audit, exports, graph, graph_ops, parity, saved_model, to_saved_model
from conversion.graph import Sizes
from conversion.runtime import SIGNATURE, load_component
from dreamlite_jax import model_folder
from dreamlite_jax.config import ModelConfig, TextConfig
from dreamlite_jax.errors import UserError

SIZES = Sizes(32, 32, 48)
needs_tensorflow = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None,
    reason='TensorFlow is not installed: python -m pip install -c constraints.txt ".[tensorflow]"',
)


# --- without TensorFlow


def test_the_rational_erf_is_xlas():
    x = np.concatenate([np.linspace(-6, 6, 100_001), np.logspace(-38, 1, 1000), [-np.inf, np.inf, 0.0]])
    x = x.astype(np.float32)
    found, theirs = np.asarray(graph_ops.rational_erf(jnp.asarray(x))), np.asarray(jax.lax.erf(jnp.asarray(x)))
    assert np.abs(found - scipy.special.erf(x.astype(np.float64))).max() <= 3.2e-7
    assert np.abs(found - theirs).max() <= 4e-7  # where XLA fuses products and sums
    assert np.isnan(graph_ops.rational_erf(jnp.float32(np.nan)))


@pytest.mark.parametrize("component", graph.COMPONENTS)
def test_written_out_nothing_is_left_that_tensorflow_cannot_read(small_model, component):
    """No composite and no erf in any component; the same numbers. The plain form has both (a control)."""
    config = model_folder.load_config(small_model)
    params, text = exports.load(component, small_model, config)
    built = graph.build(component, config, params, SIZES, text)
    case = parity.case(component, config, SIZES, 1000, seed=0)
    inputs = [case.graph[port.name] for port in built.inputs]
    plain, kinds = np.asarray(jax.jit(built.apply)(built.params, *inputs)), set()
    for marked in (False, True):
        with graph_ops.marked_native() if marked else graph_ops.written_out():
            closed = jax.make_jaxpr(lambda *args: built.apply(*args))(built.params, *inputs)  # a trace of its own
            found = jax.jit(lambda *args: built.apply(*args))(built.params, *inputs)
        names = {e.primitive.name for e in equations(closed.jaxpr)}
        assert np.abs(np.asarray(found) - plain).max() <= 2e-5 * max(1.0, np.abs(plain).max())
        kinds |= names if marked else set()
        assert marked or not {"composite", "erf"} & names
    assert component == "vae_encoder" or "composite" in kinds


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("module", ["tensorflow", "jax.experimental.jax2tf"])
def test_without_its_extra_the_command_says_so_before_any_work(small_model, tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(model_folder, "find_model", None)
    with pytest.raises(UserError, match=r"to_saved_model needs (tensorflow|jax).*\"\.\[tensorflow\]\""):
        to_saved_model.main(["--model", str(small_model), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


# --- with it


@pytest.fixture(scope="module")
def converted(small_model, tmp_path_factory):
    """The small model by the command: folder and report."""
    output = tmp_path_factory.mktemp("saved") / "small"
    code = to_saved_model.main(["--model", str(small_model), "--output", str(output)])
    return code, output, json.loads((output / "report.json").read_text())


@needs_tensorflow
@pytest.mark.slow
def test_every_component_keeps_its_numbers(converted, litert_model):
    code, output, report = converted
    assert code == 0 and report["passed"] and "tensorflow" in "".join(report["versions"])
    assert set(report["components"]) == set(graph.COMPONENTS)
    theirs = json.loads((litert_model / "report.json").read_text())["components"]
    for name, row in report["components"].items():
        assert row["parity"]["max_abs"] <= 2e-5 * max(1.0, row["parity"]["peak"])
        assert row["run_peak_memory_bytes"] > 0
        assert (row["inputs"], row["outputs"]) == (theirs[name]["inputs"], theirs[name]["outputs"])
    manifest = json.loads((output / "model.json").read_text())
    assert manifest["format"] == to_saved_model.FORMAT and manifest["files"]["text"] == "text"
    assert (output / "tokenizer.json").is_file()


@needs_tensorflow
@pytest.mark.slow
@pytest.mark.parametrize("component", graph.COMPONENTS)
def test_both_converters_agree(converted, litert_model, small_model, component, tmp_path):
    """TensorFlow's converter on the SavedModel beside litert-converter, within 2e-5 of the output's peak."""
    output = converted[1]
    done = apart.call("saved_model", "to_tflite", str(output / component), str(tmp_path / "theirs.tflite"))
    assert done.code == 0, done.log[-2000:]
    files = {"ours": litert_model / f"{component}.tflite", "theirs": tmp_path / "theirs.tflite"}
    config = model_folder.load_config(small_model)
    case = parity.case(component, config, SIZES, 1000, seed=3)
    found = {
        name: load_component(path.parent, {"files": {"it": path.name}}, "it", 1)(**case.graph)
        for name, path in files.items()
    }
    peak = max(1.0, np.abs(found["ours"]).max())
    assert found["ours"].std() > 0.01  # of something
    assert np.abs(found["ours"] - found["theirs"]).max() <= 2e-5 * peak
    other = parity.case(component, config, SIZES, 1000, seed=4)
    others = load_component(tmp_path, {"files": {"it": "theirs.tflite"}}, "it", 1)(**other.graph)
    assert np.abs(found["ours"] - others).max() > 1e-2 * peak  # of other inputs: a control
    counts = {name: audit.audit(path).ops for name, path in files.items()}
    for kinds in (("CONV_2D",), ("DEPTHWISE_CONV_2D",), ("FULLY_CONNECTED", "BATCH_MATMUL")):
        ours, theirs = (sum(counts[name].get(kind, 0) for kind in kinds) for name in ("ours", "theirs"))
        assert ours == theirs, kinds


@needs_tensorflow
@pytest.mark.slow
def test_other_weights_miss_the_floor(small_model, tmp_path, monkeypatch, capsys):
    """Negative control of the gate: exit code 1, and the folder stays with its report."""
    build = graph.build

    def changed(component, config, params, *rest):
        params["decoder"]["layers_0"]["bias"] = np.asarray(params["decoder"]["layers_0"]["bias"]) + np.float32(1e-3)
        return build(component, config, params, *rest)

    monkeypatch.setattr(graph, "build", changed)
    flags = ["--model", str(small_model), "--output", str(tmp_path / "out"), "--component", "vae_decoder"]
    assert to_saved_model.main(flags) == 1
    assert "MISSED" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "report.json").read_text())["passed"] is False
    assert (tmp_path / "out" / "vae_decoder" / "saved_model.pb").is_file()


@needs_tensorflow
@pytest.mark.slow
def test_a_saved_model_that_cannot_be_read_is_an_error_with_its_reason(tmp_path):
    with pytest.raises(RuntimeError, match=r"TensorFlow ended with code 1.*"):
        saved_model.Opened(tmp_path)(x=np.zeros(1, np.float32))


@needs_tensorflow
@pytest.mark.slow
def test_the_signature_is_that_of_litert(converted):
    import tensorflow as tf

    _, output, report = converted
    signature = tf.saved_model.load(str(output / "unet")).signatures[SIGNATURE]
    specs = signature.structured_input_signature[1]
    ports = report["components"]["unet"]["inputs"]
    assert {p["name"]: p["shape"] for p in ports} == {name: list(spec.shape) for name, spec in specs.items()}
    assert list(signature.structured_outputs) == ["velocity"]


@needs_tensorflow
@pytest.mark.slow
def test_the_released_unet_at_full_size(tmp_path):
    """The released network with random weights at 512 px: seconds, memory, max abs beside JAX."""
    text = TextConfig(encoder="qwen3_vl", source=".", max_length=512)
    config = dataclasses.replace(ModelConfig(), text=text, native_size=512, steps=4, guidance_scale=1.0)
    params = {component: random_params(config, component) for component in model_folder.COMPONENTS}
    model = model_folder.save_model(tmp_path / "model", config, params, {"source": "random"})
    del params
    flags = ["--model", str(model), "--output", str(tmp_path / "out"), "--component", "unet", "--text_length", "128"]
    assert to_saved_model.main(flags) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    row = report["components"]["unet"]
    print(
        {key: row[key] for key in ("seconds", "file_bytes", "run_peak_memory_bytes", "parity")},
        report["peak_memory_bytes"],
    )
    assert row["parity"]["max_abs"] <= 2e-5
    assert report["peak_memory_bytes"] <= exports.memory_bytes(4 * 389_968_388)
