"""Float16 arithmetic: what overflows in plain norms, and that the safe form does not."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
from litert_models import random_params, small_config

from conversion import graph, graph_ops, half, parity
from conversion.graph import Sizes
from dreamlite_jax.errors import UserError
from dreamlite_jax.models.unet import UNet
from dreamlite_jax.models.vae import VAE

CONFIG = small_config()


@functools.cache
def compiled(component, safe):
    """(sizes, inputs, flax module as a function of its parameters too, the same of the export form)."""
    sizes = Sizes(32, 32, 12, half_safe=safe)
    module, method = {
        "unet": (UNet(CONFIG.unet), None),
        "vae_encoder": (VAE(CONFIG.vae), "encode"),
        "vae_decoder": (VAE(CONFIG.vae), "decode"),
    }[component]
    wanted = jax.jit(lambda params, *inputs: module.apply({"params": params}, *inputs, method=method))
    first = built(component, random_params(CONFIG, component.split("_")[0]), sizes)
    return sizes, parity.case(component, CONFIG, sizes, 0, seed=0), wanted, jax.jit(first.apply)


def built(component, params, sizes):
    return graph.build(component, CONFIG, jax.tree.map(np.array, params), sizes)


def run(params, component="unet", safe=True):
    """(rounded run, float32 output of the flax module)."""
    sizes, case, flax_module, exact = compiled(component, safe)
    wanted = np.asarray(flax_module(params, *case.model))
    ours = built(component, params, sizes)
    inputs = [case.graph[port.name] for port in ours.inputs]
    assert np.abs(np.asarray(exact(ours.params, *inputs)) - wanted).max() <= 2e-5 * max(1, np.abs(wanted).max())
    return half.run_in_half(ours, inputs), wanted


def scaled(tree: dict, names: tuple[str, ...], factor: float) -> dict:
    """The parameters with the kernels of some modules enlarged."""
    return {
        name: scaled(value, names, factor)
        if isinstance(value, dict) and name not in names
        else jax.tree.map(lambda leaf: leaf * np.float32(factor), value)
        if name in names
        else value
        for name, value in tree.items()
    }


def peak_outside_norms(found) -> float:
    return max(peak for layer, peak in found.peaks.items() if "norm" not in layer and "proj_1" not in layer)


@pytest.mark.parametrize("component", ["unet", "vae_encoder", "vae_decoder"])
def test_ordinary_weights_stay_finite_and_close(component):
    found, wanted = run(random_params(CONFIG, component.split("_")[0]), component)
    assert found.overflows == ()
    assert found.peak <= graph_ops.PEAK**2  # what a norm squares at most, a quarter of the largest float16
    assert parity.relative_rms(wanted, found.output) < 1e-2


# The first convolution feeds the first norms and every skip; res blocks' last convolutions and the gated layers feed
# the residual streams.
ADVERSARIES = [(("conv_in",), 2000.0), (("conv2", "to_out_0"), 30.0), (("net_0",), 60.0), (("proj_in",), 1000.0)]


@pytest.mark.parametrize("names, factor", ADVERSARIES)
def test_adversarially_scaled_weights_stay_finite_and_close(names, factor):
    params = scaled(random_params(CONFIG, "unet"), names, factor)
    found, wanted = run(params)
    assert peak_outside_norms(found) > 256  # the attack reaches what a plain norm would square
    assert found.overflows == ()
    assert parity.relative_rms(wanted, found.output) < 5e-2


def test_plain_norms_overflow_on_the_same_weights():
    """Negative control."""
    params = scaled(random_params(CONFIG, "unet"), *ADVERSARIES[0])
    found, wanted = run(params, safe=False)
    assert any("norm" in layer for layer in found.overflows)
    assert not parity.relative_rms(wanted, found.output) < 5e-2


def test_a_gated_layer_without_its_scale_would_overflow():
    """Negative control of the folded factor: the same product, sixteen times larger."""
    params = scaled(random_params(CONFIG, "unet"), *ADVERSARIES[2])
    found, _ = run(params)
    sizes, case, *_ = compiled("unet", True)
    ours = built("unet", params, sizes)
    unscaled = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 16 if any(getattr(key, "key", "") == "value" for key in path) else leaf, ours.params
    )
    spoiled = half.run_in_half(
        dataclasses.replace(ours, params=unscaled), [case.graph[port.name] for port in ours.inputs]
    )
    gated = [layer for layer in found.peaks if layer.endswith("net_0")]
    assert gated and all(spoiled.peaks[layer] > 8 * found.peaks[layer] for layer in gated[:1])
    assert peak_outside_norms(spoiled) > 4 * peak_outside_norms(found)


def test_the_command_on_what_a_sampler_meets(small_model, litert_model, tmp_path, capsys):
    flags = ["--model", str(small_model), "--litert", str(litert_model), "--calls", "1"]
    assert half.main([*flags, "--output", str(tmp_path / "half.json")]) == 0
    rows = json.loads((tmp_path / "half.json").read_text())
    assert set(rows) == set(graph.COMPONENTS)
    assert all(row["overflows"] == [] and 0 < row["relative_rms"] < 2e-2 for row in rows.values())
    assert capsys.readouterr().out.count("finite") == 4


def test_the_command_wants_the_float32_folder(small_model, litert_model, tmp_path):
    folder = shutil.copytree(litert_model, tmp_path / "int8")
    manifest = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**manifest, "recipe": "int8_static"}))
    with pytest.raises(UserError, match=r"int8_static.*must be of fp32"):
        half.main(["--model", str(small_model), "--litert", str(folder)])
