"""Training of the tiny autoencoder, for data that the released one does not fit (small pictures, more channels)."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from dreamlite_jax import pictures
from dreamlite_jax.data.buckets import Size, bucket_sizes, check_sizes
from dreamlite_jax.data.forms import Images
from dreamlite_jax.data.mixture import HostShare, check_hosts, first_items, raw_batches
from dreamlite_jax.data.reading import log_path
from dreamlite_jax.data.sources import Record, open_source
from dreamlite_jax.data.transforms import open_picture
from dreamlite_jax.model_folder import new_folder, save_vae
from dreamlite_jax.models.vae import VAE
from dreamlite_jax.training import sharding
from dreamlite_jax.training.config import TrainConfig
from dreamlite_jax.training.state import OneLoss


class VAEStage(OneLoss):
    """Reconstruction under latent noise, with latents held at zero mean and unit variance a channel."""

    log_folder: Path | None = None  # where records that cannot be used are named, if anywhere

    def __init__(self, config: TrainConfig):
        self.config = config
        self.model = VAE(config.model.vae)
        if config.data.buckets.size:
            sizes, multiple = bucket_sizes(config.data.buckets), config.model.vae.downsampling
            check_sizes("config.data.buckets", sizes, multiple, "the autoencoder")

    def init_params(self, key: jax.Array) -> Any:
        size = 8 * self.config.model.vae.downsampling
        return sharding.born(self.model.init, key, jnp.zeros((1, size, size, 3)))["params"]

    def loss(self, params: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Absolute and squared error of pixels, plus the distance of the latents' moments from (0, 1)."""
        weights, images = self.config.autoencoder, batch["image"]
        variables = {"params": params}
        latents = self.model.apply(variables, images, method="encode")
        mean, std = latents.mean((0, 1, 2)), latents.std((0, 1, 2))
        moments = jnp.square(mean).mean() + jnp.square(std - 1.0).mean()
        level_key, noise_key = jax.random.split(key)
        level = weights.latent_noise * jax.random.uniform(level_key, (images.shape[0], 1, 1, 1))
        noisy = latents + level * jax.random.normal(noise_key, latents.shape)
        error = self.model.apply(variables, noisy, method="decode") - images
        absolute, squared = jnp.abs(error).mean((1, 2, 3)), jnp.square(error).mean((1, 2, 3))
        share = jax.lax.stop_gradient(absolute**weights.hard_power)
        share /= share.mean()
        loss = (share * (absolute + weights.squared_weight * squared)).mean() + weights.latent_weight * moments
        psnr = -10.0 * jnp.log10(squared.mean() / 4.0)
        return loss, {"psnr": psnr, "latent_std": std.mean(), "latent_moments": moments}

    def empty_batch(self, size: Size) -> dict[str, np.ndarray]:
        """A batch of no pictures of this size: names, shapes and dtypes without data."""
        return Images([size]).empty(0, rows=0)

    def dataset(self) -> grain.IterDataset:
        """Batches of `image`: targets of any raw sources, cut to buckets."""
        data, host, hosts = self.config.data, jax.process_index(), jax.process_count()
        if data.buckets.size or any(source.form != "sprites" for source in data.sources):
            log = log_path(self.log_folder, host) if self.log_folder else None
            return raw_batches(data, Images, seed=self.config.seed, host=host, hosts=hosts, log=log)
        check_hosts(data.batch_size, hosts)
        streams = [
            grain.MapDataset.source(open_source(source)).seed(self.config.seed + i).shuffle().repeat().map(decode_image)
            for i, source in enumerate(data.sources)
        ]
        weights = [source.weight for source in data.sources]
        stream = grain.MapDataset.mix(streams, weights) if len(streams) > 1 else streams[0]
        if hosts > 1:
            stream = HostShare(stream, data.batch_size, host, hosts)
        options = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=2 * max(1, data.threads))
        return stream.batch(data.batch_size // hosts).to_iter_dataset(options)

    @functools.cached_property
    def _compiled(self) -> Callable[[Any, np.ndarray], jax.Array]:
        """The autoencoder, compiled once however many grids there are."""
        return jax.jit(self.model.apply)

    def grid(self, params: Any) -> np.ndarray:
        """Pictures of the validation split above their reconstructions, with the PSNR of each."""
        source = (self.config.data.validation or self.config.data.sources)[0]
        _, items = first_items(source, self.config.data.buckets, self.config.grid_items)
        images = pictures.to_float(np.stack([item.target for item in items]))
        decoded = np.clip(np.asarray(self._compiled({"params": params}, images)), -1, 1)
        psnr = [pictures.psnr(a, b) for a, b in zip(images, decoded, strict=True)]
        return pictures.grid(
            [pictures.to_uint8(images), pictures.to_uint8(decoded)],
            row_titles=["picture", "decoded"],
            captions=[f"{value:.1f} dB" for value in psnr],
        )

    def export(self, params: Any, directory: Path, provenance: dict[str, Any]) -> None:
        with new_folder(directory) as folder:
            save_vae(folder / "vae.safetensors", self.config.model.vae, params, provenance)


def decode_image(record: Record) -> dict[str, np.ndarray]:
    """{"image": (H, W, 3) float32 in [-1, 1]} of a record's target, as it is."""
    return {"image": pictures.to_float(np.asarray(open_picture(record.target, record=record.id)))}
