"""A converter's error is brought down to the layer that caused it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conversion import culprit, litert
from conversion.graph import Graph, Port
from conversion.graph_ops import Node, dense, layer_norm


def network(spoiled: bool) -> Graph:
    """Two layers; `spoiled` puts a Fourier transform, which no LiteRT operation computes, into the second."""

    def apply(p, x):
        for name in ("first", "second"):
            with jax.named_scope(name):
                x = dense(Node("proj", p[name]["proj"]), layer_norm(Node("norm", p[name]["norm"]), x))
                if spoiled and name == "second":
                    with jax.named_scope("mix"):
                        x = jnp.fft.fft(x).real
        return x

    norm = {"scale": np.ones(8, np.float32), "bias": np.zeros(8, np.float32)}
    params = {name: {"proj": {"kernel": np.eye(8, dtype=np.float32)}, "norm": norm} for name in ("first", "second")}
    return Graph("unet", (Port("x", (4, 8), "float32", ""),), Port("y", (4, 8), "float32", ""), params, apply)


def test_the_layer_of_a_converter_error_is_named(tmp_path):
    with pytest.raises(litert.ConversionError, match=r"refuses second/mix \([^)]*fft") as caught:
        litert.convert(network(spoiled=True), tmp_path / "x.tflite", {})
    assert "first" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_graph_without_fault_has_no_culprit(tmp_path):
    """Negative control: every layer converts by itself, with its weights as inputs."""
    assert culprit.culprits(network(spoiled=False), litert.convert_alone) == []
