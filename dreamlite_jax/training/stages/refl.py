"""Reward feedback learning (ReFL; ImageReward, arXiv 2304.05977, algorithm 1) with a flow-matching regulariser."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from dreamlite_jax.data.latents import LatentReader
from dreamlite_jax.diffusion import guidance, sampler
from dreamlite_jax.errors import UserError
from dreamlite_jax.parallel import sharding
from dreamlite_jax.rewards.base import Context, Part, RewardSum
from dreamlite_jax.rewards.load import load_rewards
from dreamlite_jax.training import start
from dreamlite_jax.training.codec import Codec
from dreamlite_jax.training.config import ReFLConfig, TrainConfig
from dreamlite_jax.training.denoiser import Batch, Denoiser
from dreamlite_jax.training.stage import DenoisingStage
from dreamlite_jax.training.stages.flow_matching import shares, velocity_loss
from dreamlite_jax.training.state import TrainState
from dreamlite_jax.training.update import Metrics, step_key
from dreamlite_jax.types import Latent, Scalar, TimeIds

TOKENS = "tokens/"  # begins the names of a batch's fields that rewards prepared from the prompts


class ReFLStage(DenoisingStage):
    """Raises rewards of what the model draws and edits, without leaving the data behind."""

    def __init__(
        self, config: TrainConfig, denoiser: Denoiser, weights: start.Weights, codec: Codec, rewards: RewardSum
    ):
        super().__init__(config, denoiser, weights, codec)
        refl = config.refl
        self.rewards, self.thresholds = rewards, [reward.threshold for reward in refl.rewards]
        self.scales = refl.guidance_scale, refl.image_guidance_scale
        guided = guidance.is_guided(True, *self.scales)
        self.plan = guidance.branches(editing=True, guided=guided)  # of both tasks; see `Denoiser.conditioning`
        self.frozen = {"start": weights, "vae": start.Given(codec.params), "rewards": start.Given(rewards.params)}
        self.limits = {"drift": (0.0, refl.max_drift), "diversity": (refl.min_diversity, math.inf)}

    @classmethod
    def build(cls, config: TrainConfig, denoiser: Denoiser, codec: Codec, *, shapes_only: bool) -> "ReFLStage":
        if not config.refl.rewards:
            raise UserError("config.refl.rewards is empty; ReFL needs at least one reward")
        if not shapes_only:
            check_sizes(config)
        mesh = None if shapes_only else sharding.make_mesh(config.mesh)
        rewards = load_rewards(config.refl.rewards, mesh, abstract=shapes_only)
        return cls(config, denoiser, start.unet(config, denoiser.network), codec, rewards)

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One update of the parameters."""
        frozen = {
            **state.frozen,
            "start": self.update.gather(state.frozen["start"]),
            "vae": sharding.gathered(state.frozen["vae"]),
        }
        key = step_key(self.config.seed, state)
        (loss, metrics), grads = self.update.gradient(self.loss, state.params, frozen, batch, key)
        return self.update.apply(state, grads, {"loss": loss, **metrics})

    def loss(self, params: Any, frozen: Any, batch: Batch, key: jax.Array) -> tuple[Scalar, Metrics]:
        """Reward term and flow-matching regulariser, weighted.

        Metrics: each reward as `reward_<name>`, their weighted sum as `reward`; `drift`, the distance of the velocity
        on real data from the start model's, relative to the latter; `diversity`, see `spread`.
        """
        refl, denoiser = self.config.refl, self.denoiser
        flow_key, roll_key = jax.random.split(key)
        noised = denoiser.noised(batch, flow_key)
        predicted = denoiser.predicted_velocity(params, noised)
        first = denoiser.predicted_velocity(frozen["start"], noised)
        weights = shares(batch, region_weight=self.config.flow.region_weight)
        regulariser, metrics = velocity_loss(predicted, noised, weights)
        drift = jnp.sqrt(jnp.square(predicted - first).mean() / jnp.square(first).mean())

        x, sigma = self.rollout_to_late_step(params, batch, roll_key)
        latents = self.predicted_data(params, x, sigma, batch)
        parts = self.scores(frozen, latents, batch)
        shortfall = self.reward_loss(parts)
        loss = refl.flow_weight * regulariser + refl.reward_weight * shortfall
        means = {name: mean_score(part) for name, part in parts.items()}
        weighted = [term.weight * mean for term, mean in zip(self.rewards.terms, means.values(), strict=True)]
        return loss, {
            **metrics,
            "flow_loss": regulariser,
            "reward_loss": shortfall,
            "reward": sum(weighted),
            **{f"reward_{name}": mean for name, mean in means.items()},
            "drift": drift,
            "diversity": spread(latents) / spread(batch["target"]),
        }

    def rollout_to_late_step(self, params: Any, batch: Batch, key: jax.Array) -> tuple[Latent, Scalar]:
        """Samples to a random late step without gradients; returns (x, sigma) there."""
        refl, target = self.config.refl, batch["target"]
        noise_key, stop_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, target.shape)
        sigmas = jnp.asarray(self.denoiser.sigmas(target, refl.steps))
        stop = jax.random.randint(stop_key, (), first_late_step(refl), refl.steps)
        velocity, layout = self.denoiser.velocity(jax.lax.stop_gradient(params)), self.denoiser.layout
        x = sampler.rollout(velocity, noise, *self.inputs(batch), sigmas[:-1], stop, *self.scales, layout=layout)
        return jax.lax.stop_gradient(x), sigmas[stop]

    def predicted_data(self, params: Any, x: Latent, sigma: Scalar, batch: Batch) -> Latent:
        """What the step at x predicts."""
        velocity, layout = self.denoiser.velocity(params), self.denoiser.layout
        return sampler.predict(velocity, x, sigma, *self.inputs(batch), *self.scales, layout=layout)

    def inputs(self, batch: Batch) -> tuple[sampler.Conditioning, TimeIds]:
        return self.denoiser.conditioning(self.plan, batch), batch["size"]

    def reward_loss(self, parts: dict[str, Part]) -> Scalar:
        """The rewards' losses, weighted."""
        terms = zip(self.rewards.terms, parts.values(), self.thresholds, strict=True)
        return sum(term.weight * reward_loss(part, threshold, self.config.refl) for term, part, threshold in terms)

    def scores(self, frozen: Any, latents: Latent, batch: Batch) -> dict[str, Part]:
        """Each reward's scores of decoded latents; activations are computed again for gradients, not kept."""
        decode = self.codec.decode
        tokens = {name[len(TOKENS) :]: value for name, value in batch.items() if name.startswith(TOKENS)}
        tokens = traverse_util.unflatten_dict(tokens, sep="/")
        context = Context(
            {term.name: tokens.get(term.name, {}) for term in self.rewards.terms},
            jax.lax.stop_gradient(decode(frozen["vae"], batch["source"])),
            jax.lax.stop_gradient(decode(frozen["vae"], batch["target"])),
            batch["editing"],
        )

        @jax.checkpoint
        def parts(latents: Latent, context: Context) -> dict[str, Part]:
            return self.rewards.parts(frozen["rewards"], decode(frozen["vae"], latents), context)

        return parts(latents, context)

    def fields(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """What the rewards want to know of the prompts."""
        tokens = traverse_util.flatten_dict(dict(self.rewards.prepare(texts)), sep="/")
        return {f"{TOKENS}{name}": np.asarray(value) for name, value in tokens.items()}


def check_sizes(config: TrainConfig) -> None:
    """Raises `UserError` where a source has pictures of another size than a judge will be set up for."""
    for source in config.data.sources:
        sizes = LatentReader([source], config.data.text_length).sizes
        for reward in config.refl.rewards:
            height, width = reward.size_px
            other = [size for size in sizes if size != (width, height)]
            if reward.kind != "target" and other:
                raise UserError(
                    f"{source.path} has pictures of {other[0][0]} x {other[0][1]}; {reward.kind} is shown pictures of "
                    f"{width} x {height} alone (size_px): precompute with buckets of one size"
                )


def first_late_step(config: ReFLConfig) -> int:
    """The first of the rollout's steps at which gradients may be taken."""
    return config.steps - max(1, math.ceil(config.late_share * config.steps))


def mean_score(part: Part) -> Scalar:
    """Mean over the samples that the reward applies to."""
    return (part.applies * part.score).sum() / jnp.maximum(part.applies.sum(), 1.0)


def reward_loss(part: Part, threshold: float | None, config: ReFLConfig) -> Scalar:
    """Mean of max(0, threshold - score), or with `push` "above" of -max(0, score - threshold); spec section 6."""
    if threshold is None:
        loss = -part.score
    elif config.push == "below":
        loss = jnp.where(part.score < threshold, threshold - part.score, 0.0)
    else:
        loss = jnp.where(part.score > threshold, threshold - part.score, 0.0)
    return mean_score(part._replace(score=loss))


def spread(latents: Latent) -> Scalar:
    """Standard deviation over the batch, averaged over positions and channels: near 0 when all pictures are alike."""
    return jnp.std(latents, 0).mean()
