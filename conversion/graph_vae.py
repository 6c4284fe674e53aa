"""The export form of the tiny autoencoder: the same walk as `dreamlite_jax.models.vae`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dreamlite_jax.config import VAEConfig

from .graph_ops import Array, Node, conv, scoped, upsample_nearest


def encode(node: Node, config: VAEConfig, images: Array) -> Array:
    """Images (b, H, W, 3) in [-1, 1] to normalised latents (b, H/8, W/8, c)."""
    latents = _encoder(node.sub("encoder"), config, images)
    if config.shift_factor:
        latents = latents - config.shift_factor
    return latents if config.scaling_factor == 1.0 else latents * config.scaling_factor


def decode(node: Node, config: VAEConfig, latents: Array) -> Array:
    """Latents (b, h, w, c) to images (b, 8h, 8w, 3), not clipped, with parameters after `fold_range`."""
    if config.scaling_factor != 1.0:
        latents = latents / config.scaling_factor
    if config.shift_factor:
        latents = latents + config.shift_factor
    return _decoder(node.sub("decoder"), config, latents)


@scoped
def _encoder(node: Node, config: VAEConfig, images: Array) -> Array:
    x, i = (images + 1.0) / 2.0, 0
    for level, blocks in enumerate(config.encoder_blocks):
        x = conv(node.sub(f"layers_{i}"), x, stride=2 if level else 1)
        i += 1
        for _ in range(blocks):
            x = _tiny_block(node.sub(f"layers_{i}"), x)
            i += 1
    return conv(node.sub(f"layers_{i}"), x)


@scoped
def _decoder(node: Node, config: VAEConfig, latents: Array) -> Array:
    x = jax.nn.relu(conv(node.sub("layers_0"), jnp.tanh(latents / 3.0) * 3.0))
    i = 2
    for level, blocks in enumerate(config.decoder_blocks):
        for _ in range(blocks):
            x = _tiny_block(node.sub(f"layers_{i}"), x)
            i += 1
        if level < len(config.decoder_blocks) - 1:
            x = upsample_nearest(x)
            i += 1
        x = conv(node.sub(f"layers_{i}"), x)
        i += 1
    return x


def fold_range(decoder: dict[str, Any]) -> None:
    """Puts the way from [0, 1] to [-1, 1] into the last convolution.

    In the graph the converter would move the product onto the weights and leave it to be computed in every call.
    """
    name = max(decoder, key=lambda layer: int(layer.removeprefix("layers_")))
    last = decoder[name]
    decoder[name] = {"kernel": np.asarray(last["kernel"]) * np.float32(2), "bias": 2 * np.asarray(last["bias"]) - 1}


@scoped
def _tiny_block(node: Node, x: Array) -> Array:
    y = jax.nn.relu(conv(node.sub("conv_0"), x))
    y = jax.nn.relu(conv(node.sub("conv_2"), y))
    return jax.nn.relu(x + conv(node.sub("conv_4"), y))
