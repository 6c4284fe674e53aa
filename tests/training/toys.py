"""Networks small enough to check the post-training stages against mathematics, and batches for them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from dreamlite_jax.config import from_dict
from dreamlite_jax.training.codec import Codec
from dreamlite_jax.training.config import TrainConfig
from dreamlite_jax.training.denoiser import Denoiser, NullPrompt
from dreamlite_jax.types import Array

TEXT = 4  # width and length of text states


def config(stage: str, **changes: Any) -> TrainConfig:
    """A config of a post-training stage; the files that it names are never read."""
    mapping = tiny.train_config(tiny.Path("nowhere"), stage=stage, **changes)
    mapping["model"] = {**mapping["model"], "guidance_scale": 1.0, "image_guidance_scale": 1.0, "steps": 4}
    return from_dict(TrainConfig, mapping)


def batch(size: int, latent: tuple[int, int, int], seed: int = 0) -> dict[str, np.ndarray]:
    """Random latents; every second item is an edit."""
    rng = np.random.default_rng(seed)
    editing = np.arange(size, dtype=np.float32) % 2
    source = rng.normal(size=(size, *latent)) * editing[:, None, None, None]
    return {
        "target": rng.normal(size=(size, *latent)).astype(np.float32),
        "source": source.astype(np.float32),
        "weight": np.ones((size, *latent[:2], 1), np.float32),
        "text": rng.normal(size=(size, TEXT, TEXT)).astype(np.float32),
        "mask": np.ones((size, TEXT), np.float32),
        "editing": editing,
        "size": np.full((size, 2), 16.0, np.float32),
    }


class Network:
    """`velocity(params, x, sigma (b, 1, 1, 1), source, words (b, 1, 1, 1))` where a U-Net goes."""

    def __init__(self, velocity):
        self._velocity = velocity

    def clone(self, **_: Any) -> "Network":
        return self

    def apply(self, variables: Any, canvas: Array, timestep: Array, text: Array, mask: Array, size: Array) -> Array:
        x, source = jnp.split(canvas, 2, axis=2)
        words = (text * mask[:, :, None]).mean((1, 2))[:, None, None, None]
        v = self._velocity(variables["params"], x, (timestep / 1000.0)[:, None, None, None], source, words)
        return jnp.concatenate([v, jnp.zeros_like(v)], axis=2)


class Dimmer(Codec):
    """A decoder of one multiplication."""

    def __init__(self):
        self.config, self.params = tiny.CONFIG.vae, {}

    def decode(self, params: Any, latents: Array) -> Array:
        return 0.9 * latents


def denoiser(config: TrainConfig, velocity) -> Denoiser:
    return Denoiser(config, NullPrompt(np.zeros((1, TEXT), np.float32)), Network(velocity))


def gaussian(params: Any, x: Array, sigma: Array, source: Array, words: Array) -> Array:
    """The exact velocity of data that are N(mean, chol cholᵀ); latents are (b, 1, 1, 2).

    At sigma = 1, where it knows nothing but the mean, "turn" adds an affine part: one step from there then draws
    N(mean, turn turnᵀ), so that a student of this form can be any Gaussian.
    """
    del source, words
    chol = params["chol"]
    cov = chol @ chol.T
    flat, s = x[:, 0, 0], sigma[:, :, 0, 0]
    kept = 1.0 - s
    noised_cov = jnp.square(kept)[..., None] * cov[None] + jnp.square(s)[..., None] * jnp.eye(2)[None]
    centred = (flat - kept * params["mean"][None])[..., None]
    data = params["mean"][None] + kept * (cov[None] @ jnp.linalg.solve(noised_cov, centred))[..., 0]
    data += jnp.where(s > 0.999, flat @ params["turn"].T, 0.0)
    return ((flat - data) / s)[:, None, None]


def gaussian_params(mean: list[float], chol: list[list[float]], turn: float = 0.0) -> dict[str, jax.Array]:
    turned = turn * np.eye(2)
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32), {"mean": np.array(mean), "chol": np.array(chol), "turn": turned}
    )
