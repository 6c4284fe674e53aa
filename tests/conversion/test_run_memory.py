"""The memory that a run is predicted to take, beside what a process grows by that loads and runs the file."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from litert_models import random_params

from conversion import audit, exports, graph, litert, quantize
from conversion.graph import Graph, Port, Sizes
from dreamlite_jax import model_folder
from dreamlite_jax.assets import DEMO
from dreamlite_jax.config import ModelConfig, TextConfig, UNetConfig

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc, on Linux")
ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 0.15
LIBRARY_PAGES = 4e6  # of the library's own 12.6 MB, how much is in memory differs from run to run
RECIPES = ("fp32", "fp16", "int8_dynamic", "int8_static", "int4_weights")
MEASURE = """
import gc, json, sys, numpy
from pathlib import Path
from conversion import audit, runtime
from conversion.resources import peak_memory_bytes
path = Path(sys.argv[1])
ports = audit.read_metadata(path)["inputs"]
inputs = {port["name"]: audit.random_input(port, 0) for port in ports}
for port in ports:
    if port["dtype"] == "int32":
        inputs[port["name"]][:, 12:] = 0  # a prompt reads few rows of the table
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
before = int(status["VmRSS"].split()[0]) * 1024
run = runtime.load_component(path.parent, {"files": {"it": path.name}}, "it", 2)
run(**inputs), run(**inputs)
print(json.dumps(peak_memory_bytes() - before))
"""


def seen_bytes(path: Path) -> int:
    """Of a process of its own, from before LiteRT's library is there to after two calls."""
    command = [sys.executable, "-c", MEASURE, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def quantized(source: Path, component: str, recipe: str) -> Path:
    if recipe == "fp32":
        return source
    samples = quantize.random_samples(source)
    target = source.with_name(f"{recipe}_{source.name}")
    quantize.quantize(source, target, component, recipe, samples, samples)
    return target


def checked(path: Path, recipe: str) -> None:
    predicted, seen = audit.run_memory(path), seen_bytes(path)
    print(f"{recipe} {path.name}: predicted {predicted.total / 1e6:.1f} MB, seen {seen / 1e6:.1f} MB")
    assert abs(predicted.total - seen) <= TOLERANCE * seen + LIBRARY_PAGES


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Six layers of 4.2 MB of weights each."""
    rng = np.random.default_rng(0)
    params = {f"layer_{i}": rng.standard_normal((1024, 1024)).astype(np.float32) / 32 for i in range(6)}

    def apply(params, x):
        for kernel in params.values():
            x = x + x @ kernel.T
        return x

    ports = (Port("x", (8, 1024), "float32", ""), Port("y", (8, 1024), "float32", ""))
    path = tmp_path_factory.mktemp("dense") / "dense.tflite"
    litert.convert(Graph("unet", ports[:1], ports[1], params, apply), path, {})
    return path


# As "text", the one component whose weights int4_weights makes 4 bits wide; int8 leaves that one alone.
@pytest.mark.parametrize("recipe", RECIPES)
def test_dense_layers_of_every_recipe(dense, recipe):
    path = quantized(dense, "text" if recipe == "int4_weights" else "unet", recipe)
    checked(path, recipe)
    weights = 6 * 1024**2
    packed = {"fp32": 4, "fp16": 4, "int8_dynamic": 1, "int8_static": 1, "int4_weights": 0.5}[recipe]
    assert abs(audit.run_memory(path).packed / (packed * weights) - 1) < 0.05


def test_file_and_activations_alone_miss_it(dense):
    """Control: the prediction before, without the packed copy."""
    seen = seen_bytes(dense)
    assert dense.stat().st_size + audit.activation_bytes(dense) < (1 - 2 * TOLERANCE) * seen


@pytest.mark.slow
@pytest.mark.parametrize("component", graph.COMPONENTS)
def test_the_demo(component, tmp_path):
    config = model_folder.load_config(DEMO)
    params, text = exports.load(component, DEMO, config)
    sizes = Sizes(64, 64, config.text.max_length)
    path = tmp_path / f"{component}.tflite"
    litert.convert(graph.build(component, config, params, sizes, text), path, {})
    for recipe in RECIPES:
        checked(quantized(path, component, recipe), recipe)


@pytest.mark.slow
def test_a_larger_random_unet(tmp_path):
    unet = UNetConfig(
        block_out_channels=(128, 256, 448), num_heads=(2, 4, 7), transformer_layers=(1, 1, 2),
        cross_attention_dim=512, text_dim=384,
    )  # fmt: skip
    config = ModelConfig(unet=unet, text=TextConfig(max_length=128), native_size=256)
    path = tmp_path / "unet.tflite"
    built = graph.build("unet", config, random_params(config, "unet"), Sizes(256, 256, 128))
    litert.convert(built, path, {})
    for recipe in RECIPES:
        checked(quantized(path, "unet", recipe), recipe)
