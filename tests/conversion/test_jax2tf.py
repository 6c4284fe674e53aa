"""The other way to LiteRT, through TensorFlow, as a cross-check of ours: the same products and the same numbers.

Needs `pip install tensorflow-cpu`, which nothing else here does. TensorFlow 2.21 does not read the composites of this
JAX (nearest resize), so it gets the arithmetic that they stand for, which puts them under test too. The U-Net is not
here: the error function of its GELU is not read either.
"""

import jax
import numpy as np
import pytest
from litert_models import random_params, small_config

from conversion import audit, graph, litert, parity
from conversion.graph import Sizes
from conversion.runtime import load_component

pytestmark = pytest.mark.slow
SIZES = Sizes(32, 32, 12)


@pytest.fixture(scope="module")
def tensorflow():
    return pytest.importorskip("tensorflow", reason="TensorFlow is not installed; the cross-check needs tensorflow-cpu")


@pytest.mark.parametrize("component", ["vae_encoder", "vae_decoder"])
def test_both_converters_agree(tensorflow, component, tmp_path, monkeypatch):
    from jax.experimental import jax2tf

    config = small_config()
    params = random_params(config, component.split("_")[0])
    built = graph.build(component, config, params, SIZES)
    function = tensorflow.function(
        jax2tf.convert(lambda *inputs: built.apply(built.params, *inputs), with_gradient=False),
        input_signature=[tensorflow.TensorSpec(port.shape, port.dtype, name=port.name) for port in built.inputs],
        autograph=False,
    )
    with monkeypatch.context() as patch:
        patch.setattr(jax.lax, "composite", lambda function, name, version=0: function)
        traced = function.get_concrete_function()
    converter = tensorflow.lite.TFLiteConverter.from_concrete_functions([traced], function)
    (tmp_path / "theirs.tflite").write_bytes(converter.convert())
    litert.convert(built, tmp_path / "ours.tflite", {"recipe": "fp32"})

    case = parity.case(component, config, SIZES, 0, seed=0)
    run = load_component(tmp_path, {"files": {"ours": "ours.tflite"}}, "ours", 1)
    ours = run(**case.graph)
    theirs = first_output(tmp_path / "theirs.tflite", list(case.graph.values()))
    wanted = np.asarray(jax.jit(built.apply)(built.params, *case.graph.values()))
    assert np.abs(ours - theirs).max() <= 2e-5 * max(1.0, np.abs(wanted).max())
    assert np.abs(ours - wanted).max() <= 2e-5 * max(1.0, np.abs(wanted).max())
    counts = [audit.audit(tmp_path / f"{name}.tflite").ops for name in ("ours", "theirs")]
    for kinds in (("CONV_2D",), ("DEPTHWISE_CONV_2D",), ("FULLY_CONNECTED", "BATCH_MATMUL")):
        ours_has, theirs_has = (sum(count.get(kind, 0) for kind in kinds) for count in counts)
        assert ours_has == theirs_has, kinds


def first_output(path, inputs):
    """The one output of a file without named inputs; they come in the order of the function's."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    for detail, value in zip(interpreter.get_input_details(), inputs, strict=True):
        assert tuple(detail["shape"]) == value.shape
        interpreter.set_tensor(detail["index"], value)
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
