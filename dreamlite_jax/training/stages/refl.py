"""Reward feedback learning (ReFL; ImageReward, arXiv 2304.05977, algorithm 1) with a flow-matching regulariser."""

import math
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from dreamlite_jax.data.latents import LatentReader
from dreamlite_jax.diffusion import guidance, sampler
from dreamlite_jax.errors import UserError
from dreamlite_jax.models.vae import VAE
from dreamlite_jax.rewards.base import Context, Part, RewardSum
from dreamlite_jax.rewards.load import load_rewards
from dreamlite_jax.training import optim, sharding
from dreamlite_jax.training import state as train_state
from dreamlite_jax.training.config import ReFLConfig, TrainConfig
from dreamlite_jax.training.stages.latent import Batch, LatentStage, spread
from dreamlite_jax.types import Image, Latent, Scalar, TimeIds

TOKENS = "tokens/"  # begins the names of a batch's fields that rewards prepared from the prompts


@flax.struct.dataclass
class ReFLState:
    """A `TrainState`, the parameters it started from, and networks that never change: autoencoder and rewards."""

    params: Any
    ema: Any
    opt_state: Any
    step: Any
    start: Any
    frozen: Any


class ReFLStage(LatentStage):
    """Raises rewards of what the model draws and edits, without leaving the data behind."""

    def __init__(self, config: TrainConfig):
        super().__init__(config)
        if not config.refl.rewards:
            raise UserError("config.refl.rewards is empty; ReFL needs at least one reward")
        abstract = self.vae_params is None
        if not abstract:
            check_sizes(config)
        mesh = None if abstract else sharding.make_mesh(config.mesh)
        self.setup(load_rewards(config.refl.rewards, mesh, abstract=abstract))

    def setup(self, rewards: RewardSum) -> None:
        """What follows from the config and the rewards."""
        refl = self.config.refl
        self.rewards, self.thresholds = rewards, [reward.threshold for reward in refl.rewards]
        self.scales = refl.guidance_scale, refl.image_guidance_scale
        self.layout = self.config.model.unet.condition_layout
        guided = guidance.is_guided(True, *self.scales)
        self.plan = guidance.branches(editing=True, guided=guided)  # of both tasks; see `conditioning`
        # (least, most) of a metric; outside them the run has collapsed and stops
        self.limits = {"drift": (0.0, refl.max_drift), "diversity": (refl.min_diversity, math.inf)}

    def init_state(self, key: jax.Array) -> ReFLState:
        params = self.init_params(key)
        inner = train_state.create(params, optim.optimizer(self.config.optim, self.config.steps))
        start = sharding.born(lambda params: jax.tree.map(jnp.copy, params), params)
        return ReFLState(inner.params, inner.ema, inner.opt_state, inner.step, start, self.frozen())

    def frozen(self) -> Any:
        """The networks that never change; zeros where a stage without data knows shapes alone (`training.abstract`)."""
        vae = self.vae_params
        if vae is None:
            side = self.vae_config.downsampling
            vae = jax.eval_shape(VAE(self.vae_config).init, jax.random.key(0), jnp.zeros((1, side, side, 3)))["params"]

        def array(x: Any) -> Any:
            return jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x

        return jax.tree.map(array, {"vae": vae, "rewards": self.rewards.params})

    def step(self, state: ReFLState, batch: Batch) -> tuple[ReFLState, dict[str, jax.Array]]:
        """One update of the parameters."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        start = sharding.gathered(state.start, dtype)
        frozen = {**state.frozen, "vae": sharding.gathered(state.frozen["vae"])}

        def loss(params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
            return self.loss(params, start, frozen, batch, key)

        inner = train_state.TrainState(state.params, state.ema, state.opt_state, state.step)
        step = train_state.make_step(loss, config.optim, config.steps, config.seed, dtype=dtype)
        inner, metrics = step(inner, batch)
        new = state.replace(params=inner.params, ema=inner.ema, opt_state=inner.opt_state, step=inner.step)
        return new, metrics

    def loss(
        self, params: Any, start: Any, frozen: Any, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Reward term and flow-matching regulariser, weighted.

        Metrics: each reward as `reward_<name>`, their weighted sum as `reward`; `drift`, the distance of the velocity
        on real data from the start model's, relative to the latter; `diversity`, see `spread`.
        """
        refl = self.config.refl
        flow_key, roll_key = jax.random.split(key)
        noised = self.noised(batch, flow_key)
        answer, first = self.answer(params, noised), self.answer(start, noised)
        regulariser, metrics = self.flow_loss(answer, noised, batch)
        drift = jnp.sqrt(jnp.square(answer - first).mean() / jnp.square(first).mean())

        x, sigma = self.reach(params, batch, roll_key)
        latents = self.imagine(params, x, sigma, batch)
        parts = self.judge(frozen, latents, batch)
        shortfall = self.shortfall(parts)
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

    def reach(self, params: Any, batch: Batch, key: jax.Array) -> tuple[Latent, Scalar]:
        """Where the sampler is before one random late step, and its sigma; without gradients."""
        refl, target = self.config.refl, batch["target"]
        noise_key, stop_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, target.shape)
        sigmas = jnp.asarray(self.sigmas(target, refl.steps))
        stop = jax.random.randint(stop_key, (), first_late_step(refl), refl.steps)
        velocity = self.velocity(jax.lax.stop_gradient(params))
        x = sampler.rollout(velocity, noise, *self.given(batch), sigmas[:-1], stop, *self.scales, layout=self.layout)
        return jax.lax.stop_gradient(x), sigmas[stop]

    def imagine(self, params: Any, x: Latent, sigma: Scalar, batch: Batch) -> Latent:
        """Data predicted by the step at x."""
        return sampler.predict(self.velocity(params), x, sigma, *self.given(batch), *self.scales, layout=self.layout)

    def given(self, batch: Batch) -> tuple[sampler.Conditioning, TimeIds]:
        return self.conditioning(self.plan, batch), batch["size"]

    def shortfall(self, parts: dict[str, Part]) -> Scalar:
        """The rewards' losses, weighted."""
        terms = zip(self.rewards.terms, parts.values(), self.thresholds, strict=True)
        return sum(term.weight * reward_loss(part, threshold, self.config.refl) for term, part, threshold in terms)

    def judge(self, frozen: Any, latents: Latent, batch: Batch) -> dict[str, Part]:
        """Each reward's scores of decoded latents; activations are computed again for gradients, not kept."""
        decode = self.decoder()
        tokens = {name[len(TOKENS) :]: value for name, value in batch.items() if name.startswith(TOKENS)}
        tokens = traverse_util.unflatten_dict(tokens, sep="/")
        context = Context(
            {term.name: tokens.get(term.name, {}) for term in self.rewards.terms},
            self.picture(decode, frozen, batch["source"]),
            self.picture(decode, frozen, batch["target"]),
            batch["editing"],
        )

        @jax.checkpoint
        def parts(latents: Latent, context: Context) -> dict[str, Part]:
            return self.rewards.parts(frozen["rewards"], decode(frozen["vae"], latents), context)

        return parts(latents, context)

    @staticmethod
    def picture(decode: Any, frozen: Any, latents: Latent) -> Image:
        return jax.lax.stop_gradient(decode(frozen["vae"], latents))

    def prepared(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
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
