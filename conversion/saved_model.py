"""JAX → TensorFlow SavedModel, by jax2tf: the graphs of LiteRT with their signature, for whatever reads SavedModels.

Weights are variables of the SavedModel, so that no graph holds them and 2 GiB are no limit.
"""

import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from . import apart
from .graph import Graph
from .graph_ops import written_out
from .runtime import SIGNATURE

QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu"}


def convert(graph: Graph, folder: Path) -> None:
    """Writes `graph` as a SavedModel with one signature: named inputs and one named output, static shapes."""
    import tensorflow as tf
    from jax.experimental import jax2tf

    leaves, tree = jax.tree.flatten(graph.params)
    function = jax2tf.convert(
        lambda leaves, *inputs: graph.apply(jax.tree.unflatten(tree, leaves), *inputs),
        with_gradient=False,
        native_serialization_platforms=("cpu",),
    )
    module = tf.Module()
    module.weights = [tf.Variable(leaf, trainable=False) for leaf in leaves]

    @tf.function(autograph=False)
    def serve(**inputs: Any) -> dict[str, Any]:
        return {graph.output.name: function(module.weights, *(inputs[port.name] for port in graph.inputs))}

    specs = {port.name: tf.TensorSpec(port.shape, port.dtype, port.name) for port in graph.inputs}
    with written_out():
        signature = serve.get_concrete_function(**specs)
    tf.saved_model.save(module, str(folder), signatures={SIGNATURE: signature})


class Opened:
    """A SavedModel as a function of its inputs, each call in a process of its own that has TensorFlow and no JAX."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.peak_memory_bytes = 0

    def __call__(self, **inputs: np.ndarray) -> np.ndarray:
        with tempfile.TemporaryDirectory() as place:
            given, made = Path(place, "inputs.npz"), Path(place, "output.npy")
            np.savez(given, **inputs)
            done = apart.call("saved_model", "run", str(self.folder), str(given), str(made), environment=QUIET)
            if done.code or not done.answer:
                raise RuntimeError(f"{self.folder}: TensorFlow ended with code {done.code}: {done.log[-2000:]}")
            self.peak_memory_bytes = max(self.peak_memory_bytes, done.answer["peak_memory_bytes"])
            return np.load(made)


def run(folder: str, inputs: str, output: str) -> None:
    """Body of the separate process."""
    import tensorflow as tf

    from .resources import peak_memory_bytes

    signature = tf.saved_model.load(folder).signatures[SIGNATURE]
    with np.load(inputs) as given:
        (made,) = signature(**{name: tf.constant(given[name]) for name in given.files}).values()
    np.save(output, made.numpy())
    apart.answer({"peak_memory_bytes": peak_memory_bytes()})


def to_tflite(folder: str, path: str) -> None:
    """The SavedModel as a .tflite file by TensorFlow's own converter: the cross-check of `litert.convert`."""
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_saved_model(folder, signature_keys=[SIGNATURE])
    Path(path).write_bytes(converter.convert())
