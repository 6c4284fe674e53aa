"""Training of the tiny autoencoder, for data that the released one does not fit (small pictures, more channels)."""

from typing import Any

import jax
import jax.numpy as jnp

from dreamlite_jax.models.vae import VAE
from dreamlite_jax.training import start
from dreamlite_jax.training.config import TrainConfig
from dreamlite_jax.training.denoiser import Batch
from dreamlite_jax.training.feed import PictureFeed, ShapesOnly
from dreamlite_jax.training.gallery import Reconstructions
from dreamlite_jax.training.stage import Run, Stage
from dreamlite_jax.training.update import Metrics
from dreamlite_jax.types import Scalar


class VAEStage(Stage):
    """Reconstruction under latent noise, with latents held at zero mean and unit variance a channel."""

    encodes = True

    def __init__(self, config: TrainConfig):
        self.network, side = VAE(config.model.vae), 8 * config.model.vae.downsampling
        weights = start.Random(self.network, (jnp.zeros((1, side, side, 3)),), config.seed)
        super().__init__(config, start.StoredAutoencoder(config, weights.shapes()) if config.init_from else weights)

    @classmethod
    def assemble(cls, config: TrainConfig, *, shapes_only: bool = False) -> Run:
        feed, stage = PictureFeed(config), cls(config)
        gallery = Reconstructions(config, stage.network, feed)
        return Run(stage, ShapesOnly(config, images=True) if shapes_only else feed, gallery)

    def loss(self, params: Any, batch: Batch, key: jax.Array) -> tuple[Scalar, Metrics]:
        """Absolute and squared error of pixels, plus the distance of the latents' moments from (0, 1)."""
        weights, images = self.config.autoencoder, batch["image"]
        variables = {"params": params}
        latents = self.network.apply(variables, images, method="encode")
        mean, std = latents.mean((0, 1, 2)), latents.std((0, 1, 2))
        moments = jnp.square(mean).mean() + jnp.square(std - 1.0).mean()
        level_key, noise_key = jax.random.split(key)
        level = weights.latent_noise * jax.random.uniform(level_key, (images.shape[0], 1, 1, 1))
        noisy = latents + level * jax.random.normal(noise_key, latents.shape)
        error = self.network.apply(variables, noisy, method="decode") - images
        absolute, squared = jnp.abs(error).mean((1, 2, 3)), jnp.square(error).mean((1, 2, 3))
        share = jax.lax.stop_gradient(absolute**weights.hard_power)
        share /= share.mean()
        loss = (share * (absolute + weights.squared_weight * squared)).mean() + weights.latent_weight * moments
        psnr = -10.0 * jnp.log10(squared.mean() / 4.0)
        return loss, {"psnr": psnr, "latent_std": std.mean(), "latent_moments": moments}
