"""Flow-matching training of the U-Net: T2I, edit, joint and SFT are this stage with different data (spec section 6)."""

import dataclasses
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from dreamlite_jax import pictures
from dreamlite_jax.assets import vae_path
from dreamlite_jax.config import to_dict
from dreamlite_jax.data import latents as latent_data
from dreamlite_jax.diffusion import flow, guidance, panels, sampler
from dreamlite_jax.errors import UserError
from dreamlite_jax.model_folder import load_config, load_params, load_vae, save_model
from dreamlite_jax.models.unet import UNet, dummy_inputs
from dreamlite_jax.models.vae import VAE
from dreamlite_jax.training.config import TrainConfig
from dreamlite_jax.training.state import OneLoss
from dreamlite_jax.types import Array

SAMPLE_SEED = 1000  # of the first item of a grid; item i has SAMPLE_SEED + i


class FlowMatchingStage(OneLoss):
    """Velocity regression on the target panel, the condition panel clean beside it."""

    def __init__(self, config: TrainConfig):
        self.config = config
        data = config.data
        infos = [latent_data.read_info(source.path) for source in (*data.sources, *data.validation)]
        self.vae_config, self.vae_params = load_vae(vae_path(config.vae))
        for source, info in zip((*data.sources, *data.validation), infos, strict=True):
            if info["vae"] != to_dict(self.vae_config):
                raise UserError(f"{source.path} holds latents of another autoencoder than config.vae; precompute again")
        if config.model.vae != self.vae_config:
            raise UserError(f"config.model.vae is {config.model.vae}, but the autoencoder file holds {self.vae_config}")
        self.null_states = np.asarray(infos[0]["null_states"], np.float32)
        if self.null_states.shape[1] != config.model.unet.text_dim:
            raise UserError(
                f"config.model.unet.text_dim is {config.model.unet.text_dim}, but the data have text states of width "
                f"{self.null_states.shape[1]}"
            )
        self.dtype = jnp.bfloat16 if config.dtype == "bfloat16" else jnp.float32
        self.model = UNet(config.model.unet, self.dtype, config.remat)

    def init_params(self, key: jax.Array) -> Any:
        if not self.config.init_from:
            return jax.jit(self.model.init)(key, *dummy_inputs(self.config.model.unet))["params"]
        folder = model_of(self.config.init_from)
        if (found := load_config(folder).unet) != self.config.model.unet:
            raise UserError(
                f"config.init_from {folder} holds a U-Net of another architecture: {found}; the config asks for "
                f"{self.config.model.unet}"
            )
        return jax.tree.map(jnp.asarray, load_params(folder, "unet"))

    def null_text(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """States (s, d) and mask (s,) of the empty prompt, padded."""
        tokens = len(self.null_states)
        states = np.zeros((length, self.null_states.shape[1]), np.float32)
        states[:tokens] = self.null_states
        return states, (np.arange(length) < tokens).astype(np.float32)

    def loss(self, params: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Squared error of the velocity on the target panel, weighted on the region that an edit changes."""
        config, target = self.config.flow, batch["target"]
        b, h, w, _ = target.shape
        sigma_key, noise_key, text_key, image_key = jax.random.split(key, 4)
        mu = flow.shift_mu(self.config.model.scheduler, h, w)
        sigma = flow.training_sigmas(sigma_key, b, mu=mu, logit_mean=config.logit_mean, logit_std=config.logit_std)
        noise = jax.random.normal(noise_key, target.shape)

        keep_image = jax.random.uniform(image_key, (b,)) >= config.image_drop
        source = jnp.where(flow.per_sample(keep_image, target), batch["source"], 0.0)
        drop_text = jax.random.uniform(text_key, (b,)) < config.text_drop
        null_states, null_mask = self.null_text(batch["text"].shape[1])
        text = jnp.where(drop_text[:, None, None], null_states[None], batch["text"])
        mask = jnp.where(drop_text[:, None], null_mask[None], batch["mask"])

        canvas = panels.compose(flow.interpolate(target, noise, sigma), source, self.config.model.unet.condition_layout)
        prediction = self.model.apply({"params": params}, canvas, flow.TIMESTEPS * sigma, text, mask, batch["size"])
        prediction = panels.target_half(prediction, self.config.model.unet.condition_layout)
        error = jnp.square(prediction - flow.velocity_target(target, noise))
        weight = batch["weight"] if config.region_weight else jnp.ones_like(batch["weight"])
        loss = (weight * error).mean() / weight.mean()
        per_item, editing = error.mean((1, 2, 3)), batch["editing"]
        generated, edited = jnp.maximum(b - editing.sum(), 1.0), jnp.maximum(editing.sum(), 1.0)
        return loss, {
            "mse": error.mean(),
            "mse_generate": (per_item * (1.0 - editing)).sum() / generated,
            "mse_edit": (per_item * editing).sum() / edited,
        }

    def dataset(self) -> grain.IterDataset:
        data = self.config.data
        return latent_data.mixture(
            data.sources,
            batch_size=data.batch_size,
            text_length=data.text_length,
            seed=self.config.seed,
            threads=data.threads,
            host=jax.process_index(),
            hosts=jax.process_count(),
        )

    def grid(self, params: Any) -> np.ndarray:
        """Fixed validation items: result above truth for generation; source, result, target for edits."""
        grids = []
        for source in self.config.data.validation or self.config.data.sources:
            records = latent_data.open_examples(source.path)
            items = [latent_data.unpack(records[i]) for i in range(min(self.config.grid_items, len(records)))]
            batch = jax.tree.map(
                lambda *x: np.stack(x), *[latent_data.collate(item, self.config.data.text_length) for item in items]
            )
            editing = items[0].source is not None
            result, truth, given = (
                pictures.to_uint8(self._decode(x))
                for x in (self._sample(params, batch, editing), batch["target"], batch["source"])
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

    def _decode(self, latents: Array) -> np.ndarray:
        vae = VAE(self.vae_config)
        return np.asarray(jax.jit(lambda z: vae.apply({"params": self.vae_params}, z, method="decode"))(latents))

    def _sample(self, params: Any, batch: dict[str, np.ndarray], editing: bool) -> jax.Array:
        model = self.config.model
        b, h, w, c = batch["target"].shape
        null = sampler.TextStatesMask(*(x[None] for x in self.null_text(batch["text"].shape[1])))
        prompt = sampler.TextStatesMask(batch["text"], batch["mask"])
        conditioning = sampler.condition(guidance.branches(editing, guided=True), prompt, null, batch["source"])
        sigmas = flow.sampling_sigmas(self.config.grid_steps, flow.shift_mu(model.scheduler, h, w))
        noise = sampler.noise_from_seeds(range(SAMPLE_SEED, SAMPLE_SEED + b), (h, w, c))

        def run(params, noise, conditioning, sizes):
            def velocity(*inputs):
                return self.model.apply({"params": params}, *inputs)

            return sampler.sample(
                velocity, noise, conditioning, sizes, sigmas, model.guidance_scale, model.image_guidance_scale,
                layout=model.unet.condition_layout,
            )[0]  # fmt: skip

        return jax.jit(run)(params, noise, conditioning, batch["size"])

    def export(self, params: Any, directory: Path, provenance: dict[str, Any]) -> None:
        config = dataclasses.replace(self.config.model, vae=self.vae_config)
        save_model(directory, config, {"unet": params, "vae": self.vae_params}, provenance)


def model_of(location: str) -> Path:
    """The model folder at `location`, or the one exported into a workdir."""
    path = Path(location)
    return path / "model" if (path / "model").is_dir() else path
