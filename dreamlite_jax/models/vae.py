"""The tiny autoencoder of the TAESD family (oracle: diffusers `AutoencoderTiny`), NHWC.

Layer names follow the oracle's `nn.Sequential` indices, in which activations and upsampling take a number too.
"""

import jax.numpy as jnp
from flax import linen as nn

from dreamlite_jax.config import VAEConfig
from dreamlite_jax.models.blocks import conv, upsample_nearest
from dreamlite_jax.types import FeatureMap, Image, Latent


class TinyBlock(nn.Module):
    """Three 3x3 convolutions with ReLU between, residual, ReLU (oracle: `AutoencoderTinyBlock`)."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        y = nn.relu(conv(self.width, 3, dtype=self.dtype, name="conv_0")(x))
        y = nn.relu(conv(self.width, 3, dtype=self.dtype, name="conv_2")(y))
        # A small start lets each block begin as the identity; without norms the stack would train slowly otherwise.
        start = nn.initializers.variance_scaling(0.01, "fan_in", "truncated_normal")
        return nn.relu(x + conv(self.width, 3, dtype=self.dtype, kernel_init=start, name="conv_4")(y))


class Encoder(nn.Module):
    config: VAEConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: Image) -> Latent:
        config, x, i = self.config, (images + 1.0) / 2.0, 0
        for level, blocks in enumerate(config.encoder_blocks):
            down = level > 0
            x = conv(config.width, 3, stride=2 if down else 1, bias=not down, dtype=self.dtype, name=f"layers_{i}")(x)
            i += 1
            for _ in range(blocks):
                x = TinyBlock(config.width, self.dtype, name=f"layers_{i}")(x)
                i += 1
        return conv(config.latent_channels, 3, dtype=self.dtype, name=f"layers_{i}")(x)


class Decoder(nn.Module):
    config: VAEConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, latents: Latent) -> Image:
        config = self.config
        x = jnp.tanh(latents / 3.0) * 3.0
        x = nn.relu(conv(config.width, 3, dtype=self.dtype, name="layers_0")(x))
        i = 2
        for level, blocks in enumerate(config.decoder_blocks):
            last = level == len(config.decoder_blocks) - 1
            for _ in range(blocks):
                x = TinyBlock(config.width, self.dtype, name=f"layers_{i}")(x)
                i += 1
            if not last:
                x = upsample_nearest(x)
                i += 1
            x = conv(3 if last else config.width, 3, bias=last, dtype=self.dtype, name=f"layers_{i}")(x)
            i += 1
        return x * 2.0 - 1.0


class VAE(nn.Module):
    """Images in [-1, 1] ↔ latents at 1/8 of the size, normalised by the config's shift and scale."""

    config: VAEConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.encoder = Encoder(self.config, self.dtype)
        self.decoder = Decoder(self.config, self.dtype)

    def encode(self, images: Image) -> Latent:
        """(b, H, W, 3) → (b, H/8, W/8, c)."""
        latents = self.encoder(images.astype(self.dtype)).astype(jnp.float32)
        return (latents - self.config.shift_factor) * self.config.scaling_factor

    def decode(self, latents: Latent) -> Image:
        """(b, h, w, c) → (b, 8h, 8w, 3), not clipped."""
        latents = latents / self.config.scaling_factor + self.config.shift_factor
        return self.decoder(latents.astype(self.dtype)).astype(jnp.float32)

    def __call__(self, images: Image) -> Image:
        """Reconstruction; also what `init` traces."""
        return self.decode(self.encode(images))
