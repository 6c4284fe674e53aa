"""The released network at full size with random weights: converted, small enough, the same numbers, and how fast."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from litert_models import random_params

from conversion import audit
from dreamlite_jax import model_folder
from dreamlite_jax.config import ModelConfig, TextConfig

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
LARGEST = {"fp32": 1.57e9, "fp16": 0.79e9, "int8_dynamic": 0.40e9}  # bytes of the U-Net
SMALL = ("--height", "512", "--width", "512")  # a canvas of 64x128 latents
SLOWEST_INT8 = 0.6  # of PyTorch's time


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder of everything below."""
    folder = tmp_path_factory.mktemp("full")
    if shutil.disk_usage(folder).free < 16e9:
        pytest.skip("a full-size model and its files take 16 GB of disk")
    return folder


@pytest.fixture(scope="module")
def model(made):
    text = TextConfig(encoder="qwen3_vl", source=".", max_length=512)
    config = dataclasses.replace(ModelConfig(), text=text, native_size=1024, steps=4, guidance_scale=1.0)
    params = {component: random_params(config, component) for component in model_folder.COMPONENTS}
    return model_folder.save_model(made / "model", config, params, {"source": "random"})


def run(module: str, *flags: str | Path) -> str:
    command = [sys.executable, "-m", f"conversion.{module}", *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(" ".join(map(str, flags)), done.stdout, sep="\n")
    assert done.returncode == 0, done.stderr
    return done.stdout


def convert(module: str, model: Path, output: Path, *flags: str) -> dict:
    run(module, "--model", model, "--output", output, "--text_length", "128", *flags)
    return json.loads((output / "report.json").read_text())


@pytest.fixture(scope="module")
def at_512(model, made):
    """The U-Net by every way of running it: folders and, where there is one, the report's row."""
    reports = {
        "fp32": convert("to_litert", model, made / "fp32", "--component", "unet", *SMALL),
        "onnx": convert("to_onnx", model, made / "onnx", "--component", "unet", *SMALL),
    }
    for recipe in ("fp16", "int8_dynamic"):
        flags = ("--component", "unet", "--recipe", recipe, *SMALL)
        reports[recipe] = convert("to_litert", model, made / recipe, *flags)
    run("to_torch", "--model", model, "--output", made / "torch")
    return {name: report["components"]["unet"] for name, report in reports.items()}


def test_every_component_at_1024_pixels(model, made):
    report = convert("to_litert", model, made / "whole", "--component", "all")
    assert set(report["components"]) == {"unet", "vae_encoder", "vae_decoder"}
    for name, row in report["components"].items():
        assert row["parity"]["max_abs"] <= 2e-5 * max(1.0, row["parity"]["peak"]), name
        assert audit.audit(made / "whole" / f"{name}.tflite").faults == ()
    unet = report["components"]["unet"]
    assert unet["parity"]["max_abs"] <= 2e-5
    assert unet["file_bytes"] <= LARGEST["fp32"] and unet["peak_memory_so_far_bytes"] <= 8e9 and unet["seconds"] <= 300
    shutil.rmtree(made / "whole")


def test_the_unet_in_float32_at_512_pixels(at_512):
    assert at_512["fp32"]["parity"]["max_abs"] <= 2e-5


@pytest.mark.parametrize("recipe", ["fp16", "int8_dynamic"])
def test_the_unet_quantised(at_512, made, recipe):
    assert at_512[recipe]["quantized"]["file_bytes"] <= LARGEST[recipe]
    assert audit.audit(made / recipe / "unet.tflite").faults == ()


def test_the_onnx_file_with_its_weights_beside_it(at_512, made):
    assert at_512["onnx"]["parity"]["max_abs"] <= 2e-5
    assert (made / "onnx" / "unet.onnx.data").stat().st_size > 1.5e9


def test_latency_beside_pytorch(at_512, made):
    runs = {"fp32": "fp32", "fp16": "fp16", "int8": "int8_dynamic", "onnx": "onnx", "torch": "torch"}
    flags = [flag for name, folder in runs.items() for flag in ("--run", f"{name}={made / folder}")]
    run("latency", *flags, "--output", made / "latency.json")
    found = json.loads((made / "latency.json").read_text())["runs"]
    assert found["int8"]["median"] <= SLOWEST_INT8 * found["torch"]["median"]
