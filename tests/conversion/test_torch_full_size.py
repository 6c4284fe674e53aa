"""The released architecture at full size: bit-equal there and back, both ways, and within a bound on memory."""

import filecmp
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch_layouts as layouts
from qwen_oracle import QWEN3_VL_2B

from conversion import diffusers_config, names, torch_files
from dreamlite_jax.config import UNetConfig, VAEConfig
from dreamlite_jax.model_folder import COMPONENTS, expected_shapes, weight_file
from dreamlite_jax.models.qwen_vl import load
from dreamlite_jax.models.qwen_vl.config import from_transformers
from dreamlite_jax.models.qwen_vl.model import QwenVL, abstract_params
from dreamlite_jax.tensor_files import Stored, write_streamed, write_tensors

MEMORY_FACTOR = 3  # of the checkpoint's size, U-Net and autoencoder alone
ARCHITECTURES = {"unet": UNetConfig(), "vae": VAEConfig()}
# Runs a command and prints its peak memory in bytes. Not `ru_maxrss`: a child begins with that of its parent.
PEAK = (
    "import runpy, sys; sys.argv = sys.argv[1:]\n"
    "try: runpy.run_module(sys.argv[0], run_name='__main__')\n"
    "except SystemExit as stop: assert not stop.code, stop.code\n"
    "print('peak', *[1024 * int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM')])"
)


def run(module: str, *argv: str | Path) -> int:
    """Runs a command in a process of its own and returns its peak memory, bytes."""
    if not Path("/proc/self/status").is_file():
        pytest.skip("peak memory is read from /proc, which is Linux's")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, module, *map(str, argv)], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def random_bits(rng: np.random.Generator, shape: tuple[int, ...], dtype) -> np.ndarray:
    """Floats of any value, NaNs among them: quicker to draw than normal ones, and only the bits are compared."""
    return np.frombuffer(rng.bytes(math.prod(shape) * np.dtype(dtype).itemsize), dtype).reshape(shape)


def write_full_size(folder: Path, pipeline: str, dtype, shards: int) -> Path:
    """The layout of a released folder with random tensors; written shard by shard to spare memory here."""
    configs = {
        "unet": diffusers_config.unet_to_diffusers(ARCHITECTURES["unet"]),
        "vae": diffusers_config.vae_to_diffusers(ARCHITECTURES["vae"]),
    }
    rng = np.random.default_rng(0)
    for component, config in configs.items():
        table = {"unet": names.UNET, "vae": names.VAE}[component]
        tensors = list(table.tensors(expected_shapes(component, ARCHITECTURES[component])).values())
        count = shards if component == "unet" else 1
        where = {}
        for i in range(count):
            part = tensors[i::count]
            file = (
                torch_files.WEIGHTS if count == 1 else f"diffusion_pytorch_model-{i + 1:05}-of-{count:05}.safetensors"
            )
            (folder / component).mkdir(parents=True, exist_ok=True)
            values = {t.name: random_bits(rng, t.shape, dtype) for t in part}
            write_tensors(folder / component / file, values, {"format": "pt"})
            where |= dict.fromkeys(values, file)
        if count > 1:
            index = {"metadata": {}, "weight_map": where}
            layouts.write_json(folder / component / f"{torch_files.WEIGHTS}.index.json", index)
        layouts.write_json(folder / component / "config.json", config)
    scheduler = diffusers_config.scheduler_to_diffusers(layouts.SCHEDULER)
    layouts.write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    layouts.write_json(folder / "model_index.json", {"_class_name": pipeline})
    return folder


def write_text_encoder(folder: Path) -> None:
    """Qwen3-VL-2B in bfloat16, 4.3 GB: its config, and a file with its tensors; of the values only the bits matter."""
    config = from_transformers(QWEN3_VL_2B)
    slots = load.expected_tensors(abstract_params(QwenVL(config)), config)
    rng = np.random.default_rng(1)
    block = random_bits(rng, (2**20,), ml_dtypes.bfloat16)

    def values(name: str) -> np.ndarray:
        shape = slots[name.removeprefix("model.")].shape
        return np.resize(np.roll(block, rng.integers(len(block))), shape)

    layouts.write_json(folder / "config.json", QWEN3_VL_2B)
    kinds = {f"model.{name}": Stored(slot.shape, "BF16") for name, slot in slots.items()}
    write_streamed(folder / load.SINGLE, kinds, values, {"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pipeline", "dtype", "shards", "text"),
    [("DreamLitePipeline", "fp32", 3, False), ("DreamLiteMobilePipeline", "bf16", 1, True)],
    ids=["base, fp32, 3 shards", "mobile, bf16, one file, text encoder"],
)
def test_full_size_there_and_back(pipeline, dtype, shards, text, tmp_path):
    """A diffusers folder to ours to diffusers, and from there to ours again: the reverse trip of the first of ours."""
    theirs, ours, back, again = (tmp_path / name for name in ("theirs", "ours", "back", "again"))
    write_full_size(theirs, pipeline, layouts.DTYPES[dtype], shards)
    size = sum(path.stat().st_size for path in theirs.rglob("*.safetensors"))
    if text:
        write_text_encoder(theirs / "text_encoder")
    peaks = [
        run("conversion.from_torch", "--source", theirs, "--output", ours),
        run("conversion.to_torch", "--model", ours, "--output", back),
        run("conversion.from_torch", "--source", back, "--output", again),
    ]
    tensors = 0
    for component in COMPONENTS:
        tensors += layouts.assert_same_files(
            *(torch_files.weight_files(folder / component) for folder in (theirs, back))
        )
        layouts.assert_same_files(*([folder / weight_file(component)] for folder in (ours, again)))
    report = json.loads((ours / "report.json").read_text())
    assert report["components"]["unet"]["parameters"] == 389_968_388
    assert json.loads((back / "model_index.json").read_text())["_class_name"] == pipeline
    for copy in (ours, back, again) if text else ():
        part = f"text_encoder/{load.SINGLE}"
        assert filecmp.cmp(theirs / part, copy / part, shallow=False)
        shutil.rmtree(copy / "text_encoder")  # pytest would keep 17 GB
    shutil.rmtree(theirs)
    factors = ", ".join(f"{peak / size:.2f}" for peak in peaks)
    print(
        f"{pipeline}, {dtype}: {tensors} tensors bit-equal there and back, and the reverse; checkpoint "
        f"{size / 1e9:.2f} GB, peak memory of each conversion {factors} of it"
    )
    assert all(peak < MEMORY_FACTOR * size for peak in peaks)
