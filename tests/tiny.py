"""The smallest model with every part, synthetic latents for it and a training config, for tests of the machinery."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dreamlite_jax import model_folder
from dreamlite_jax.config import ModelConfig, UNetConfig, VAEConfig, to_dict
from dreamlite_jax.data import latents
from dreamlite_jax.models.unet import UNet, dummy_inputs
from dreamlite_jax.models.vae import VAE

TEXT_DIM = 384  # of MiniLM
CONFIG = ModelConfig(
    unet=UNetConfig(
        block_out_channels=(8, 16), layers_per_block=1, down_blocks=("cross", "self_cross"),
        up_blocks=("self_cross", "plain"), transformer_layers=(1, 1), num_heads=(2, 2), cross_attention_dim=8,
        text_dim=TEXT_DIM, size_embed_dim=4, norm_groups=4,
    ),
    vae=VAEConfig(width=4, encoder_blocks=(0, 0, 0), decoder_blocks=(0, 0, 0)),
    native_size=16,
    steps=2,
    guidance_scale=2.0,
)  # fmt: skip
LATENT = (4, 4, 4)  # (h, w, c) of 16 px


def vae_params(seed: int = 0) -> dict[str, Any]:
    return jax.jit(VAE(CONFIG.vae).init)(jax.random.key(seed), jnp.zeros((1, 16, 16, 3)))["params"]


def unet_params(seed: int = 0) -> dict[str, Any]:
    return jax.jit(UNet(CONFIG.unet).init)(jax.random.key(seed), *dummy_inputs(CONFIG.unet))["params"]


def write_vae(path: Path) -> Path:
    return model_folder.save_vae(path, CONFIG.vae, vae_params(), {"made": "at random"})


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
    """Mapping of a joint flow-matching run on `root`/t2i and `root`/edit, decoded with `root`/vae.safetensors."""
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
    write_latents(root / "t2i", "generate", 16)
    write_latents(root / "edit", "edit", 16)
    return root
