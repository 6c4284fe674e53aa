"""The released architecture at full size: bit-equal there and back, and within a bound on memory."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch_layouts as layouts

from conversion import diffusers_config, names, torch_files
from dreamlite_jax.config import UNetConfig, VAEConfig
from dreamlite_jax.model_folder import COMPONENTS, expected_shapes
from dreamlite_jax.tensor_files import write_tensors

MEMORY_FACTOR = 3  # of the checkpoint's size
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
            values = {t.name: rng.standard_normal(t.shape, np.float32).astype(dtype) for t in part}
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pipeline", "dtype", "shards"),
    [("DreamLitePipeline", "fp32", 3), ("DreamLiteMobilePipeline", "bf16", 1)],
    ids=["base, fp32, 3 shards", "mobile, bf16, one file"],
)
def test_full_size_there_and_back(pipeline, dtype, shards, tmp_path):
    source = write_full_size(tmp_path / "theirs", pipeline, layouts.DTYPES[dtype], shards)
    size = sum(path.stat().st_size for path in source.rglob("*.safetensors"))
    peaks = {
        "from_torch": run("conversion.from_torch", "--source", source, "--output", tmp_path / "ours"),
        "to_torch": run("conversion.to_torch", "--model", tmp_path / "ours", "--output", tmp_path / "back"),
    }
    for component in COMPONENTS:
        layouts.assert_same_bits(
            layouts.read_component(source / component), layouts.read_component(tmp_path / "back" / component)
        )
    report = json.loads((tmp_path / "ours" / "report.json").read_text())
    assert report["components"]["unet"]["parameters"] == 389_968_388
    assert json.loads((tmp_path / "back" / "model_index.json").read_text())["_class_name"] == pipeline
    factors = {name: peak / size for name, peak in peaks.items()}
    print(f"{pipeline} {dtype}: checkpoint {size / 1e9:.2f} GB, peak memory " + str(factors))
    assert all(1 < factor < MEMORY_FACTOR for factor in factors.values())
