"""The network as training sees it: what it is conditioned on, and what it answers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dreamlite_jax.diffusion import flow, guidance, panels, sampler
from dreamlite_jax.models.unet import UNet
from dreamlite_jax.parallel import sharding
from dreamlite_jax.training.config import TrainConfig
from dreamlite_jax.types import Array, Float, Latent, PerSample, TextMask, TextStates, TimeIds

Batch = dict[str, Array]


class NullPrompt(NamedTuple):
    """The empty prompt.

    Attributes:
      states: (s, d), alone.
      tail: how many states of its own it has beside a picture (`PromptEncoder.null_tail`).
    """

    states: np.ndarray
    tail: int = 0


class Noised(NamedTuple):
    """Real data on their way to noise, as the network sees them, and the velocity that it should answer with."""

    canvas: Float[Array, "b h w2 c2"]
    sigma: PerSample
    text: TextStates
    mask: TextMask
    size: TimeIds
    velocity: Latent


def unet(config: TrainConfig) -> UNet:
    """The network of a config."""
    dtype = jnp.bfloat16 if config.dtype == "bfloat16" else jnp.float32
    return UNet(config.model.unet, dtype, config.remat, remat_keep=config.remat_keep)


class Denoiser:
    """A network (by default the config's U-Net), conditioned on prompts and source pictures."""

    def __init__(self, config: TrainConfig, null_prompt: NullPrompt, network: Any = None):
        self.config, self.null_prompt = config, null_prompt
        self.network = unet(config) if network is None else network
        self.layout = config.model.unet.condition_layout

    def velocity(self, params: Any) -> sampler.VelocityFn:
        """The network with these parameters, as the sampler wants it; its activations stay where their items are."""
        return lambda *inputs: self.network.clone(sharding=sharding.activations()).apply({"params": params}, *inputs)

    def predicted_velocity(self, params: Any, noised: Noised) -> Latent:
        """The network's velocity of the target panel."""
        inputs = noised.canvas, flow.TIMESTEPS * noised.sigma, noised.text, noised.mask, noised.size
        return panels.target_half(self.velocity(params)(*inputs), self.layout)

    def null_text(self, batch: Batch) -> sampler.TextStatesMask:
        """The empty prompt of each item: one for all (1, s, d), or beside its own picture where the encoder looks at it
        (b, s, d)."""
        null = self.null_prompt.states
        tokens, place = len(null), np.arange(batch["text"].shape[1])
        states = np.zeros((1, len(place), null.shape[1]), np.float32)
        states[0, :tokens] = null
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

        canvas = panels.compose(flow.interpolate(target, noise, sigma), source, self.layout)
        return Noised(canvas, sigma, text, mask, batch["size"], flow.velocity_target(target, noise))
