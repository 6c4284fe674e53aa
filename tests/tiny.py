"""The smallest model with every part (quick to compile), synthetic latents for it and a training config."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dreamlite_jax import model_folder
from dreamlite_jax.config import ModelConfig, UNetConfig, VAEConfig, to_dict
from dreamlite_jax.data import latents
from dreamlite_jax.text.encoder import PromptRequest, PromptStates, stack_states

TEXT_DIM = 384  # of MiniLM
CONFIG = ModelConfig(
    unet=UNetConfig(
        block_out_channels=(8,), layers_per_block=1, down_blocks=("plain",), up_blocks=("plain",), num_heads=(2,),
        transformer_layers=(1,), separable_convs=False, cross_attention_dim=8, text_dim=TEXT_DIM, size_embed_dim=4,
        norm_groups=4,
    ),
    vae=VAEConfig(width=4, encoder_blocks=(0, 0, 0), decoder_blocks=(0, 0, 0)),
    native_size=16,
    steps=2,
    guidance_scale=2.0,
)  # fmt: skip
LATENT = (4, 4, 4)  # (h, w, c) of 16 px


def random_params(component: str, seed: int = 0, config: Any = None) -> dict[str, Any]:
    """Parameters of "unet" or "vae" near those of `init`, drawn without compiling anything."""
    shapes = model_folder.expected_shapes(component, config or getattr(CONFIG, component))
    rng, flat = np.random.default_rng(seed), {}
    for name, shape in shapes.items():
        if name.endswith("kernel"):
            flat[name] = rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))
        else:
            flat[name] = rng.normal(size=shape) * 0.1 + name.endswith("scale")
    return model_folder.unflatten({name: value.astype(np.float32) for name, value in flat.items()})


def vae_params(seed: int = 0) -> dict[str, Any]:
    return random_params("vae", seed)


def unet_params(seed: int = 0) -> dict[str, Any]:
    return random_params("unet", seed)


def write_vae(path: Path, config: VAEConfig = CONFIG.vae) -> Path:
    return model_folder.save_vae(path, config, random_params("vae", config=config), {"made": "at random"})


def write_model(directory: Path) -> Path:
    return model_folder.save_model(
        directory, CONFIG, {"unet": unet_params(), "vae": vae_params()}, {"made": "at random"}
    )


def examples(task: str, count: int, seed: int = 0) -> list[latents.Example]:
    """Random latents and states; an edit changes the upper half of the picture."""
    rng = np.random.default_rng([seed, task == "edit"])
    changed = np.repeat([[1.0], [1.0], [0.0], [0.0]], 4, axis=1).astype(np.float32)
    return [
        latents.Example(
            id=f"{task}_{i}",
            task=task,
            text=f"{task} number {i}",
            target=rng.normal(size=LATENT).astype(np.float16).astype(np.float32),
            source=rng.normal(size=LATENT).astype(np.float16).astype(np.float32) if task == "edit" else None,
            changed=changed if task == "edit" else None,
            states=rng.normal(size=(3 + i % 3, TEXT_DIM)).astype(np.float16).astype(np.float32),
            size=(16, 16),
        )
        for i in range(count)
    ]


def write_latents(directory: Path, task: str, count: int, *, shards: int = 2, seed: int = 0) -> Path:
    """A complete folder as `precompute` leaves it."""
    directory.mkdir(parents=True)
    items = examples(task, count, seed)
    for i in range(shards):
        latents.write_shard(latents.shard_path(directory, i, shards), iter(items[i::shards]))
    null = np.random.default_rng(99).normal(size=(2, TEXT_DIM))
    latents.write_info(directory, {"shards": shards, "vae": to_dict(CONFIG.vae)}, null)
    return directory


def train_config(root: Path, **changes: Any) -> dict[str, Any]:
    """Mapping of a joint flow-matching run from `write_inputs`. It starts from a model: compiling `init` takes long."""
    return {
        "stage": "flow_matching",
        "model": to_dict(CONFIG),
        "data": {
            "sources": [{"path": str(root / "t2i")}, {"path": str(root / "edit")}],
            "batch_size": 8,
            "text_length": 8,
        },
        "optim": {"learning_rate": 1e-2, "warmup_steps": 2, "ema_decay": 0.9},
        "vae": str(root / "vae.safetensors"),
        "init_from": str(root / "first"),
        "steps": 12,
        "log_every": 5,
        "checkpoint_every": 4,
        "grid_every": 100,
        "grid_items": 2,
        "grid_steps": 2,
        **changes,
    }


def write_config(path: Path, mapping: dict[str, Any]) -> Path:
    """A config file that returns the mapping."""
    path.write_text(f"def get_config():\n    return {mapping!r}\n")
    return path


def write_inputs(root: Path) -> Path:
    """All that `train_config` names."""
    write_vae(root / "vae.safetensors")
    write_model(root / "first")
    write_latents(root / "t2i", "generate", 16)
    write_latents(root / "edit", "edit", 16)
    return root


class WordEncoder:
    """A `PromptEncoder` that gives each word a random state of its own: quick, and prompts remain distinct."""

    hidden_dim = TEXT_DIM
    buckets = (16, 64)
    null_tail = 0

    def encode(self, requests: Sequence[PromptRequest], length: int | None = None) -> PromptStates:
        rows = [np.stack([self.state(word) for word in ["", *request.user_text.split()]]) for request in requests]
        return stack_states(rows, self.hidden_dim, self.buckets, length)

    def state(self, word: str) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "little")
        return np.random.default_rng(seed).normal(size=TEXT_DIM).astype(np.float32)
