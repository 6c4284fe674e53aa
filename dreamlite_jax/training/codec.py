"""The autoencoder of the data, which training never changes: pictures to latents and back."""

from typing import Any

import jax
import jax.numpy as jnp

from dreamlite_jax.config import VAEConfig
from dreamlite_jax.diffusion import flow
from dreamlite_jax.models.vae import VAE
from dreamlite_jax.training.denoiser import Batch
from dreamlite_jax.types import Image, Latent


class Codec:
    """A frozen autoencoder; `params` are shapes where nothing will be computed."""

    def __init__(self, config: VAEConfig, params: Any):
        self.config, self.params, self._vae = config, params, VAE(config)

    @classmethod
    def of_shapes(cls, config: VAEConfig) -> "Codec":
        """For compiles where the file is not here."""
        picture = jnp.zeros((1, config.downsampling, config.downsampling, 3))
        return cls(config, jax.eval_shape(VAE(config).init, jax.random.key(0), picture)["params"])

    def decode(self, params: Any, latents: Latent) -> Image:
        """Pictures, not clipped; with these parameters, so that a compiled step need not hold them as constants."""
        return self._vae.apply({"params": params}, latents, method="decode")

    def encoded(self, batch: Batch) -> Batch:
        """The batch with latents in place of pictures, if it has pictures; pure, no gradient goes through."""
        if "target_image" not in batch:
            return batch
        batch = dict(batch)
        images = jnp.concatenate([batch.pop("target_image"), batch.pop("source_image")])
        latents = jax.lax.stop_gradient(self._vae.apply({"params": self.params}, images, method="encode"))
        target, source = jnp.split(latents, 2)
        return batch | {"target": target, "source": source * flow.per_sample(batch["editing"], source)}
