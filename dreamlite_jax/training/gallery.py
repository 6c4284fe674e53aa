"""What a run shows along the way and leaves at its end: grids of fixed items, and the export."""

import dataclasses
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from dreamlite_jax import pictures
from dreamlite_jax.diffusion import guidance, sampler
from dreamlite_jax.model_folder import new_folder, save_model, save_vae
from dreamlite_jax.training.config import TrainConfig
from dreamlite_jax.training.denoiser import Denoiser
from dreamlite_jax.training.feed import PictureFeed
from dreamlite_jax.types import Array, Latent, TimeIds

SAMPLE_SEED = 1000  # of the first item of a grid; item i has SAMPLE_SEED + i


@runtime_checkable
class Gallery(Protocol):
    """Pictures and export of a run; both are called in one process, with whole parameters."""

    def grid(self, params: Any) -> np.ndarray:
        """Labelled picture of fixed items, (H, W, 3) uint8."""

    def export(self, params: Any, directory: Path, provenance: dict[str, Any]) -> None:
        """Writes what the stage is for, with the averaged parameters."""


class Drawings:
    """What the U-Net draws of the first validation items, and its model folder.

    `feed` is a `LatentFeed` or a `PairFeed`. Programs are compiled once a shape, however many grids there are: the
    other processes wait for each.
    """

    def __init__(self, config: TrainConfig, denoiser: Denoiser, feed: Any):
        self.config, self.denoiser, self.feed = config, denoiser, feed
        self._decode, self._sample = jax.jit(feed.codec.decode), jax.jit(self._sampled)

    def grid(self, params: Any) -> np.ndarray:
        """Fixed validation items: result above truth for generation; source, result, target for edits."""
        grids = []
        for source in self.config.data.validation or self.config.data.sources:
            items, batch = self.feed.first(source, self.config.grid_items)
            editing = items[0].source is not None
            result, truth, given = (
                pictures.to_uint8(np.asarray(self._decode(self.feed.codec.params, x)))
                for x in (self._drawn(params, batch, editing), batch["target"], batch["source"])
            )
            rows, titles = [(result, "result"), (truth, "target")], f"{items[0].task}: {Path(source.path).name}"
            if editing:
                rows.insert(0, (given, "source"))
            grids.append(
                pictures.grid(
                    [row for row, _ in rows],
                    row_titles=[name for _, name in rows],
                    captions=[item.text for item in items],
                    title=titles,
                )
            )
        return pictures.stack(grids)

    def _drawn(self, params: Any, batch: dict[str, np.ndarray], editing: bool) -> jax.Array:
        model = self.config.model
        b, h, w, c = batch["target"].shape
        guided = guidance.is_guided(editing, model.guidance_scale, model.image_guidance_scale)
        conditioning = self.denoiser.conditioning(guidance.branches(editing, guided), batch)
        noise = sampler.noise_from_seeds(range(SAMPLE_SEED, SAMPLE_SEED + b), (h, w, c))
        return self._sample(params, noise, conditioning, batch["size"])

    def _sampled(self, params: Any, noise: Latent, conditioning: sampler.Conditioning, sizes: TimeIds) -> Array:
        model, steps = self.config.model, min(self.config.grid_steps, self.config.model.steps)
        return sampler.sample(
            self.denoiser.velocity(params), noise, conditioning, sizes, self.denoiser.sigmas(noise, steps),
            model.guidance_scale, model.image_guidance_scale, layout=self.denoiser.layout,
        )[0]  # fmt: skip

    def export(self, params: Any, directory: Path, provenance: dict[str, Any]) -> None:
        """Writes a model folder; its sampling settings are those of `config.model`."""
        codec = self.feed.codec
        config = dataclasses.replace(self.config.model, vae=codec.config)
        save_model(directory, config, {"unet": params, "vae": codec.params}, provenance)


class Reconstructions:
    """What the autoencoder makes of the first validation pictures, and its file."""

    def __init__(self, config: TrainConfig, network: Any, feed: PictureFeed):
        self.config, self.feed, self._apply = config, feed, jax.jit(network.apply)

    def grid(self, params: Any) -> np.ndarray:
        """Pictures of the validation split above their reconstructions, with the PSNR of each."""
        source = (self.config.data.validation or self.config.data.sources)[0]
        _, batch = self.feed.first(source, self.config.grid_items)
        images = batch["image"]
        decoded = np.clip(np.asarray(self._apply({"params": params}, images)), -1, 1)
        psnr = [pictures.psnr(a, b) for a, b in zip(images, decoded, strict=True)]
        return pictures.grid(
            [pictures.to_uint8(images), pictures.to_uint8(decoded)],
            row_titles=["picture", "decoded"],
            captions=[f"{value:.1f} dB" for value in psnr],
        )

    def export(self, params: Any, directory: Path, provenance: dict[str, Any]) -> None:
        """Writes a folder with `vae.safetensors`."""
        with new_folder(directory) as folder:
            save_vae(folder / "vae.safetensors", self.config.model.vae, params, provenance)
