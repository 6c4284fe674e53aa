"""Nearness to a known picture: a perceptual distance in the manner of LPIPS, and the reward that is its negative.

LPIPS (arXiv 1801.03924, eq. 1): feature maps of a fixed network, each position scaled to unit length, squared
differences weighted a channel, averaged over positions, summed over layers. The network here is the encoder of an
autoencoder, which travels with the package, so that the small run needs nothing from a hub.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dreamlite_jax.config import VAEConfig
from dreamlite_jax.errors import UserError
from dreamlite_jax.model_folder import load_vae
from dreamlite_jax.models.vae import VAE
from dreamlite_jax.rewards.base import Context
from dreamlite_jax.types import Array, FeatureMap, Image, PerSample

ROOT_EPS = 1e-6
UNIT_EPS = 1e-8  # added to squared lengths: a vector of zeros has no direction, and its gradient must be a number

Features = Callable[[Any, Image], Sequence[FeatureMap]]  # (params, images) -> feature maps, finest first


def perceptual_distance(
    first: Sequence[FeatureMap],
    second: Sequence[FeatureMap],
    weights: Sequence[Array] | None = None,
    *,
    root: bool = False,
) -> PerSample:
    """(b,) LPIPS between two pictures' feature maps.

    Args:
      weights: (c,) of each layer's channels, as LPIPS learns them; None: 1, a plain distance of directions.
      root: take each position's length of the difference instead of its square.
    """
    total = jnp.zeros(first[0].shape[0])
    for layer, (a, b) in enumerate(zip(first, second, strict=True)):
        squared = jnp.square(unit_length(a) - unit_length(b))
        squared = (squared if weights is None else squared * weights[layer]).sum(-1)
        total += (smooth_root(squared) if root else squared).mean((1, 2))
    return total


def smooth_root(squared: Array) -> Array:
    """Square root with a finite slope at 0, where it is 0."""
    return jnp.sqrt(squared + ROOT_EPS) - ROOT_EPS**0.5


def unit_length(features: FeatureMap) -> FeatureMap:
    """Each position's channels divided by their length."""
    return features * jax.lax.rsqrt(jnp.square(features).sum(-1, keepdims=True) + UNIT_EPS)


def encoder_features(config: VAEConfig) -> Features:
    """What the encoder of an autoencoder sees at the end of each of its levels, before the next one halves the size."""
    model = VAE(config)
    ends = np.cumsum([blocks + 1 for blocks in config.encoder_blocks]) - 1
    taps = [f"layers_{end}" for end in ends]

    def features(params: Any, images: Image) -> list[FeatureMap]:
        def tapped(module: Any, method: str) -> bool:
            return method == "__call__" and module.path in [("encoder", tap) for tap in taps]

        _, state = model.apply({"params": params}, images, method="encode", capture_intermediates=tapped)
        return [state["intermediates"]["encoder"][tap]["__call__"][0] for tap in taps]

    return features


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity, so that it can be jitted
class TargetReward:
    """How near a picture is to the true one of its training record: 0 when equal, lower the farther.

        score = - (perceptual_weight · LPIPS with root + pixel_weight · mean absolute pixel error)

    A judge for data in which the words determine the picture, such as the sprites: it needs pairs, knows nothing that
    the data do not say, and is no preference of people. Lengths and not squares: squares reward the blurred mean of all
    that a prompt may show, while lengths find it no better than one of them, and every blur of one of them worse.

    Attributes:
      features, params: the network that looks, and its parameters.
      channel_weights: of each layer (`perceptual_distance`).
      perceptual_weight, pixel_weight: with the defaults (pixels in [0, 1], features of the shipped autoencoder) one
        wrong object of a 64-pixel scene costs about 1, half of it from each part.
    """

    features: Features
    params: Any
    channel_weights: Sequence[Array] | None = None
    perceptual_weight: float = 0.7
    pixel_weight: float = 11.0

    @classmethod
    def from_vae(cls, path: str | Path, **options: float) -> "TargetReward":
        """With the features of an autoencoder file (`save_vae`)."""
        config, params = load_vae(path)
        return cls(encoder_features(config), jax.tree.map(jnp.asarray, params), **options)

    def __post_init__(self):
        for name in ("perceptual_weight", "pixel_weight"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value >= 0):
                raise UserError(f"{name} is {value}; it must be a number of at least 0")

    def prepare(self, prompts: Sequence[str]) -> Mapping[str, np.ndarray]:
        """Nothing: the words are in the record's picture."""
        return {}

    def distances(self, params: Any, images: Image, target: Image) -> dict[str, PerSample]:
        """The two parts of the score, unweighted."""
        params, target = jax.lax.stop_gradient((params, target))
        seen, wanted = self.features(params, images), self.features(params, target)
        return {
            "perceptual": perceptual_distance(seen, wanted, self.channel_weights, root=True),
            "pixel": smooth_root(jnp.square((images - target) / 2.0)).mean((1, 2, 3)),
        }

    def __call__(self, params: Any, images: Image, context: Context) -> PerSample:
        parts = self.distances(params, images, context.target)
        return -(self.perceptual_weight * parts["perceptual"] + self.pixel_weight * parts["pixel"])
