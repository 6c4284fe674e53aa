"""Checkpoints in the layouts of diffusers with random tensors, and what is in a folder."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import oracles

from conversion import diffusers_config, names, torch_files
from dreamlite_jax import model_folder
from dreamlite_jax.config import SchedulerConfig, UNetConfig, VAEConfig
from dreamlite_jax.tensor_files import open_tensors, write_tensors

UNET, VAE = oracles.SMALL_UNET, VAEConfig(width=8, encoder_blocks=(1, 2, 1, 1), decoder_blocks=(2, 1, 1, 1))
SCHEDULER = SchedulerConfig(max_shift=1.16)
DTYPES = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
Tensors = dict[str, np.ndarray]


def random_tensors(component: str, config: UNetConfig | VAEConfig, dtype: Any = np.float32, seed: int = 0) -> Tensors:
    """A checkpoint with torch names and shapes."""
    rng = np.random.default_rng(seed)
    table = {"unet": names.UNET, "vae": names.VAE}[component]
    tensors = table.tensors(model_folder.expected_shapes(component, config)).values()
    return {tensor.name: rng.standard_normal(tensor.shape, np.float32).astype(dtype) for tensor in tensors}


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_component(folder: Path, config: dict, tensors: Tensors, shards: int = 1, variant: str = "") -> Path:
    """A component as diffusers lays it out, in one file or in shards with an index."""
    write_json(folder / "config.json", config)
    if shards == 1:
        write_tensors(folder / f"diffusion_pytorch_model{variant}.safetensors", tensors, {"format": "pt"})
        return folder
    where = {
        name: f"diffusion_pytorch_model-{i % shards + 1:05}-of-{shards:05}.safetensors"
        for i, name in enumerate(tensors)
    }
    for file in set(where.values()):
        write_tensors(folder / file, {n: t for n, t in tensors.items() if where[n] == file}, {"format": "pt"})
    write_json(folder / f"{torch_files.WEIGHTS}.index.json", {"metadata": {}, "weight_map": where})
    return folder


def write_pipeline(
    folder: Path, name: str = "DreamLitePipeline", dtype: Any = np.float32, shards: int = 1, variant: str = ""
) -> Path:
    """A pipeline folder without text encoder."""
    unet = diffusers_config.unet_to_diffusers(UNET, 32)
    write_component(folder / "unet", unet, random_tensors("unet", UNET, dtype), shards, variant)
    write_component(folder / "vae", diffusers_config.vae_to_diffusers(VAE), random_tensors("vae", VAE, dtype, 1))
    write_json(folder / "scheduler" / "scheduler_config.json", diffusers_config.scheduler_to_diffusers(SCHEDULER))
    write_json(folder / "model_index.json", {"_class_name": name})
    return folder


def read_all(*files: Path) -> Tensors:
    tensors = {}
    for path in files:
        with open_tensors(path) as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def read_component(folder: Path) -> Tensors:
    return read_all(*torch_files.weight_files(folder))


def assert_same_bits(a: Tensors, b: Tensors) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert a[name].tobytes() == b[name].tobytes(), name


def assert_same_files(a: list[Path], b: list[Path]) -> int:
    """As `assert_same_bits`, of checkpoints that are too large to read whole; returns how many tensors they have."""
    found, other = torch_files.checkpoint(a), torch_files.checkpoint(b)
    assert found.keys() == other.keys()
    for name in found:
        pair = []
        for path, kind in (found[name], other[name]):
            with open_tensors(path) as file:
                pair.append((kind, file.get_tensor(name).tobytes()))
        assert pair[0] == pair[1], name
    return len(found)


def write_taesd(folder: Path, dtype: Any = ml_dtypes.bfloat16) -> Tensors:
    """The two files of an original TAESD; returns the same tensors with diffusers' names."""
    folder.mkdir(parents=True, exist_ok=True)
    theirs = random_tensors("vae", VAE, dtype)
    halves: dict[str, Tensors] = {"encoder": {}, "decoder": {}}
    for name, tensor in theirs.items():
        half, _, index, rest = name.split(".", 3)
        halves[half][f"{int(index) + (half == 'decoder')}.{rest}"] = tensor
    for half, tensors in halves.items():
        write_tensors(folder / f"taesd_{half}.safetensors", tensors)
    return theirs
