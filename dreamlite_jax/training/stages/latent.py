"""What stages that train the U-Net on latents share: start, data, conditioning, flow-matching loss, grids, export."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np

from dreamlite_jax import pictures
from dreamlite_jax.assets import vae_path
from dreamlite_jax.config import ModelConfig, VAEConfig, from_dict, to_dict
from dreamlite_jax.data import latents as latent_data
from dreamlite_jax.data import transforms
from dreamlite_jax.data.buckets import Size, check_sizes
from dreamlite_jax.data.forms import Latents, Pairs
from dreamlite_jax.data.mixture import first_items, raw_batches, source_sizes, text_fields
from dreamlite_jax.data.reading import log_path
from dreamlite_jax.data.sources import open_source
from dreamlite_jax.diffusion import flow, guidance, panels, sampler
from dreamlite_jax.errors import UserError
from dreamlite_jax.model_folder import MANIFEST, find_model, load_config, load_params, load_vae, save_model
from dreamlite_jax.models.unet import UNet, dummy_inputs
from dreamlite_jax.models.vae import VAE
from dreamlite_jax.tensor_files import sha256_of
from dreamlite_jax.text.cache import load_remembering
from dreamlite_jax.text.encoder import PromptRequest
from dreamlite_jax.training import checkpoint, sharding
from dreamlite_jax.training.config import MeshConfig, SourceConfig, TrainConfig
from dreamlite_jax.types import Array, Float, Latent, PerSample, Scalar, TextMask, TextStates, TimeIds

SAMPLE_SEED = 1000  # of the first item of a grid; item i has SAMPLE_SEED + i
Batch = dict[str, Array]


class Noised(NamedTuple):
    """Real data on their way to noise, as the network sees them, and the velocity that it should answer with."""

    canvas: Float[Array, "b h w2 c2"]
    sigma: PerSample
    text: TextStates
    mask: TextMask
    size: TimeIds
    velocity: Latent


class Facts(NamedTuple):
    """Of the data: their autoencoder, its parameters, the states (s, d) of the empty prompt, and how many own states
    the empty prompt has beside a picture (`PromptEncoder.null_tail`)."""

    vae_config: VAEConfig
    vae_params: Any
    null_states: np.ndarray
    null_tail: int = 0


class LatentStage:
    """A U-Net, its autoencoder, and batches of latents and text states. A kind of training adds its loss or step.

    Attributes:
      log_folder: where records that cannot be used are named, if anywhere.
    """

    log_folder: Path | None = None

    def __init__(self, config: TrainConfig):
        self.config = config
        self.vae_config, self.vae_params, self.null_states, self.null_tail = self.facts()
        self.dtype = jnp.bfloat16 if config.dtype == "bfloat16" else jnp.float32
        self.model = UNet(config.model.unet, self.dtype, config.remat, remat_keep=config.remat_keep)

    def facts(self) -> Facts:
        """What must be known of the data before any is read; raises `UserError` where it does not fit the config."""
        config, data = self.config, self.config.data
        if data.encode == "on_device":
            return self.facts_of_raw()
        for source in (*data.sources, *data.validation):
            if source.form != "latents":
                raise UserError(
                    f"source {source.path} is of kind {source.form}; config.data.encode=on_device reads raw pictures, "
                    "precomputed reads the folders that precompute wrote"
                )
        infos = [latent_data.read_info(source.path) for source in (*data.sources, *data.validation)]
        vae_file = vae_path(config.vae)
        vae_config, vae_params = load_vae(vae_file)
        own = sha256_of([vae_file])
        for source, info in zip((*data.sources, *data.validation), infos, strict=True):
            if info["vae"] != to_dict(vae_config) or info.get("vae_sha256", own) != own:
                raise UserError(
                    f"{source.path} holds latents of another autoencoder than config.vae {vae_file}; name the one that "
                    "precompute had, or precompute again"
                )
            sizes = latent_data.LatentReader([source], data.text_length).sizes
            check_sizes(source.path, sizes, config.model.size_multiple, "the U-Net")
        tail = max(info.get("null_tail", 0) for info in infos)
        return self.checked(Facts(vae_config, vae_params, np.asarray(infos[0]["null_states"], np.float32), tail))

    def facts_of_raw(self) -> Facts:
        """As `facts`, where the stage encodes pictures and words itself; loads the text encoder."""
        config, data = self.config, self.config.data
        for source in (*data.sources, *data.validation):
            sizes = source_sizes(data.buckets, [] if data.buckets.size else [open_source(source)])
            check_sizes("config.data.buckets", sizes, config.model.size_multiple, "the U-Net")
        vae_config, vae_params = load_vae(vae_path(config.vae))
        here = jax.local_devices()  # every process encodes its own part of a batch
        mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=len(here)), here)
        folder = find_model(config.init_from) if config.init_from else "."
        self.encoder = load_remembering(config.model.text, folder, mesh)
        states, mask = self.encoder.encode([PromptRequest("null", "")])
        return self.checked(Facts(vae_config, vae_params, states[0, : int(mask[0].sum())], self.encoder.null_tail))

    def checked(self, facts: Facts) -> Facts:
        """The facts, if they are what the config says."""
        model, width = self.config.model, facts.null_states.shape[1]
        if model.vae != facts.vae_config:
            raise UserError(f"config.model.vae is {model.vae}, but the autoencoder file holds {facts.vae_config}")
        if width != model.unet.text_dim:
            raise UserError(
                f"config.model.unet.text_dim is {model.unet.text_dim}, but the data have text states of width {width}"
            )
        return facts

    # --- parameters

    def init_params(self, key: jax.Array) -> Any:
        if not self.config.init_from:
            return sharding.born(self.model.init, key, *dummy_inputs(self.config.model.unet))["params"]
        traced = isinstance(key, jax.core.Tracer)  # when the loop asks for shapes alone, nothing is read
        return self.params_of(self.config.init_from, "init_from", shapes_only=traced)

    def params_of(self, location: str, field: str, *, shapes_only: bool = False) -> Any:
        """U-Net parameters, on the host, of the model folder or workdir that `config.<field>` names."""
        folder = find_model(location)
        exported = (folder / MANIFEST).exists() or not checkpoint.steps_in(folder)
        stored = load_config(folder) if exported else from_dict(
            ModelConfig, checkpoint.saved_config(folder)["model"], f"{folder}: config.model"
        )  # fmt: skip
        if (found := stored.unet) != self.config.model.unet:
            raise UserError(
                f"config.{field} {folder} holds a U-Net of another architecture: {found}; the config asks for "
                f"{self.config.model.unet}"
            )
        inputs = dummy_inputs(self.config.model.unet)
        shapes = jax.eval_shape(self.model.init, jax.random.key(0), *inputs)["params"]
        if shapes_only:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return load_params(folder, "unet") if exported else checkpoint.averaged(folder, shapes)

    # --- the network and what it is conditioned on

    def velocity(self, params: Any) -> sampler.VelocityFn:
        """The network with these parameters, as the sampler wants it; its activations stay where their items are."""
        return lambda *inputs: self.model.clone(sharding=sharding.activations()).apply({"params": params}, *inputs)

    def null_text(self, batch: Batch) -> sampler.TextStatesMask:
        """The empty prompt of each item: one for all (1, s, d), or beside its own picture where the encoder looks at it
        (b, s, d)."""
        tokens, place = len(self.null_states), np.arange(batch["text"].shape[1])
        states = np.zeros((1, len(place), self.null_states.shape[1]), np.float32)
        states[0, :tokens] = self.null_states
        blind = sampler.TextStatesMask(states, (place < tokens).astype(np.float32)[None])
        if "null_tail" not in batch:
            return blind
        tail, place = batch["null_tail"], place - batch["null_from"][:, None].astype(jnp.int32)
        inside = jnp.clip(place, 0, tail.shape[1] - 1)[..., None]
        own = jnp.where(place[..., None] < 0, batch["text"], jnp.take_along_axis(jnp.asarray(tail), inside, axis=1))
        mask = (place < tail.shape[1]).astype(jnp.float32)
        sees = (batch["null_from"] >= 0)[:, None]
        return sampler.TextStatesMask(
            jnp.where(sees[..., None], own * mask[..., None], blind.states), jnp.where(sees, mask, blind.mask)
        )

    def conditioning(self, plan: Sequence[guidance.Branch], batch: Batch) -> sampler.Conditioning:
        """What the branches of a plan see of a batch.

        A batch of both tasks takes the plan of edits: generation has a blank source, with which its three branches
        combine to v0 + g (v1 - v0), as its two do.
        """
        prompt = sampler.TextStatesMask(batch["text"], batch["mask"])
        return sampler.condition(plan, prompt, self.null_text(batch), batch["source"])

    def sigmas(self, latents: Latent, steps: int) -> np.ndarray:
        """The sampler's schedule for latents of this size."""
        return flow.sampling_sigmas(steps, flow.shift_mu(self.config.model.scheduler, *latents.shape[1:3]))

    # --- flow matching

    def noised(self, batch: Batch, key: jax.Array) -> Noised:
        """A batch between data and noise, some of its texts and source pictures dropped."""
        config, target = self.config.flow, batch["target"]
        b, h, w, _ = target.shape
        sigma_key, noise_key, text_key, image_key = jax.random.split(key, 4)
        mu = flow.shift_mu(self.config.model.scheduler, h, w)
        sigma = flow.training_sigmas(sigma_key, b, mu=mu, logit_mean=config.logit_mean, logit_std=config.logit_std)
        noise = jax.random.normal(noise_key, target.shape)

        keep_image = jax.random.uniform(image_key, (b,)) >= config.image_drop
        source = jnp.where(flow.per_sample(keep_image, target), batch["source"], 0.0)
        drop_text = jax.random.uniform(text_key, (b,)) < config.text_drop
        null = self.null_text(batch)
        text = jnp.where(drop_text[:, None, None], null.states, batch["text"])
        mask = jnp.where(drop_text[:, None], null.mask, batch["mask"])

        canvas = panels.compose(flow.interpolate(target, noise, sigma), source, self.config.model.unet.condition_layout)
        return Noised(canvas, sigma, text, mask, batch["size"], flow.velocity_target(target, noise))

    def answer(self, params: Any, noised: Noised) -> Latent:
        """The network's velocity of the target panel."""
        out = self.velocity(params)(noised.canvas, flow.TIMESTEPS * noised.sigma, noised.text, noised.mask, noised.size)
        return panels.target_half(out, self.config.model.unet.condition_layout)

    def flow_loss(self, answer: Latent, noised: Noised, batch: Batch) -> tuple[Scalar, dict[str, Scalar]]:
        """Squared error of the velocity on the target panel, weighted on the region that an edit changes."""
        return self.mean_flow_loss(answer, noised, self.shares(batch))

    def shares(self, batch: Batch) -> dict[str, Array]:
        """What each item and latent pixel weighs in the means of `mean_flow_loss`: 1 on average over the batch."""
        weight = batch["weight"] if self.config.flow.region_weight else jnp.ones_like(batch["weight"])
        editing, b = batch["editing"], len(batch["editing"])
        return {
            "weight": weight / weight.mean(),
            "generate": (1.0 - editing) * b / jnp.maximum(b - editing.sum(), 1.0),
            "edit": editing * b / jnp.maximum(editing.sum(), 1.0),
        }

    def mean_flow_loss(
        self, answer: Latent, noised: Noised, shares: dict[str, Array]
    ) -> tuple[Scalar, dict[str, Scalar]]:
        """`flow_loss` as plain means over items, so that the mean over parts of a batch is that of the batch."""
        error = jnp.square(answer - noised.velocity)
        per_item = error.mean((1, 2, 3))
        return (shares["weight"] * error).mean(), {
            "mse": error.mean(),
            "mse_generate": (per_item * shares["generate"]).mean(),
            "mse_edit": (per_item * shares["edit"]).mean(),
        }

    # --- data

    def prepared(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Further fields of a batch with these texts; shapes follow from their number alone, 0 too. None here."""
        return {}

    def extra_fields(self, text: str) -> dict[str, np.ndarray]:
        """Those of one row."""
        return {name: value[0] for name, value in self.prepared([text]).items()}

    def empty_batch(self, size: Size) -> dict[str, np.ndarray]:
        """A batch of no latents of pictures of this size: names, shapes and dtypes without data."""
        model, (width, height) = self.config.model, size
        latent = (height // model.vae.downsampling, width // model.vae.downsampling, model.vae.latent_channels)
        form = Latents([latent], self.config.data.text_length, model.unet.text_dim, self.null_tail)
        return form.empty(0, rows=0) | self.prepared([])

    def dataset(self) -> grain.IterDataset:
        """Batches of the config's sources."""
        data, host = self.config.data, jax.process_index()
        log = log_path(self.log_folder, host) if self.log_folder else None
        if data.encode == "on_device":
            factor = self.vae_config.downsampling
            return raw_batches(
                data, lambda sizes: Pairs(sizes, factor), seed=self.config.seed, host=host, hosts=jax.process_count(),
                log=log, encoder=self.encoder,
            )  # fmt: skip
        return latent_data.mixture(
            data.sources,
            batch_size=data.batch_size,
            text_length=data.text_length,
            seed=self.config.seed,
            threads=data.threads,
            host=host,
            hosts=jax.process_count(),
            extend=self.extra_fields,
            log=log,
            max_bad_fraction=data.max_bad_fraction,
        )

    def encoded(self, batch: Batch) -> Batch:
        """The batch with latents in place of pictures, if it has pictures; pure, no gradient goes through."""
        if "target_image" not in batch:
            return batch
        vae, batch = VAE(self.vae_config), dict(batch)
        images = jnp.concatenate([batch.pop("target_image"), batch.pop("source_image")])
        latents = jax.lax.stop_gradient(vae.apply({"params": self.vae_params}, images, method="encode"))
        target, source = jnp.split(latents, 2)
        return batch | {"target": target, "source": source * flow.per_sample(batch["editing"], source)}

    # --- pictures

    def grid(self, params: Any) -> np.ndarray:
        """Fixed validation items: result above truth for generation; source, result, target for edits."""
        grids = []
        for source in self.config.data.validation or self.config.data.sources:
            items, batch = self._first(source)
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

    def _first(self, source: SourceConfig) -> tuple[Sequence[latent_data.Example | transforms.Item], Batch]:
        """The first items of a source, of one size and task, and a batch of them."""
        data, count = self.config.data, self.config.grid_items
        if data.encode == "precomputed":
            items = latent_data.first_examples(source, count)
            rows = [latent_data.collate(item, data.text_length, self.null_tail) for item in items]
            return items, jax.tree.map(lambda *x: np.stack(x), *rows)
        size, items = first_items(source, data.buckets, count)
        form = Pairs([size], self.vae_config.downsampling)
        batch = form.empty(0, len(items))
        for row, item in enumerate(items):
            form.fill(batch, row, item)
        batch |= text_fields(self.encoder, [form.request(item) for item in items], data.text_length)
        return items, jax.device_get(self._compiled_encoder(batch))

    def decoder(self) -> Callable[[Any, Latent], Array]:
        """(autoencoder parameters, latents) -> pictures, not clipped."""
        vae = VAE(self.vae_config)
        return lambda params, latents: vae.apply({"params": params}, latents, method="decode")

    # Compiled once a shape, however many grids there are: the other processes wait for each.

    @functools.cached_property
    def _compiled_encoder(self) -> Callable[[Batch], Batch]:
        return jax.jit(self.encoded)

    @functools.cached_property
    def _compiled_decoder(self) -> Callable[[Any, Latent], Array]:
        return jax.jit(self.decoder())

    @functools.cached_property
    def _compiled_sampler(self) -> Callable[[Any, Latent, sampler.Conditioning, TimeIds], Latent]:
        model, steps = self.config.model, min(self.config.grid_steps, self.config.model.steps)

        def run(params: Any, noise: Latent, conditioning: sampler.Conditioning, sizes: TimeIds) -> Latent:
            return sampler.sample(
                self.velocity(params), noise, conditioning, sizes, self.sigmas(noise, steps), model.guidance_scale,
                model.image_guidance_scale, layout=model.unet.condition_layout,
            )[0]  # fmt: skip

        return jax.jit(run)

    def _decode(self, latents: Array) -> np.ndarray:
        return np.asarray(self._compiled_decoder(self.vae_params, latents))

    def _sample(self, params: Any, batch: dict[str, np.ndarray], editing: bool) -> jax.Array:
        model = self.config.model
        b, h, w, c = batch["target"].shape
        guided = guidance.is_guided(editing, model.guidance_scale, model.image_guidance_scale)
        conditioning = self.conditioning(guidance.branches(editing, guided), batch)
        noise = sampler.noise_from_seeds(range(SAMPLE_SEED, SAMPLE_SEED + b), (h, w, c))
        return self._compiled_sampler(params, noise, conditioning, batch["size"])

    def export(self, params: Any, directory: Path, provenance: dict[str, Any]) -> None:
        """Writes a model folder; its sampling settings are those of `config.model`."""
        config = dataclasses.replace(self.config.model, vae=self.vae_config)
        save_model(directory, config, {"unet": params, "vae": self.vae_params}, provenance)


def spread(latents: Latent) -> Scalar:
    """Standard deviation over the batch, averaged over positions and channels: near 0 when all pictures are alike."""
    return jnp.std(latents, 0).mean()
