"""Distribution matching distillation to a few steps without guidance (DMD2, arXiv 2405.14867), in flow form.

A velocity at a noised picture x_s = (1 - s) z + s e predicts the data end mu = x_s - s v = (x_s + s² score) / (1 - s).
So the gradient of the student's divergence from its teacher, score_fake - score_real (DMD2 eq. 2), is up to a positive
factor mu_fake - mu_real = s (v_real - v_fake): the guided teacher's velocity against that of the fake score, a network
that is trained all along on what the student makes.

With `config.dmd.region_weight` both losses count more where an edit changes its picture, as flow matching's does. A
positive weight does not move the place where the two scores agree.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.lax import stop_gradient

from dreamlite_jax.diffusion import flow, guidance, panels, sampler
from dreamlite_jax.errors import UserError
from dreamlite_jax.models import blocks
from dreamlite_jax.models.unet import dummy_inputs
from dreamlite_jax.parallel import sharding
from dreamlite_jax.training import optim, start
from dreamlite_jax.training.codec import Codec
from dreamlite_jax.training.config import TrainConfig
from dreamlite_jax.training.denoiser import Batch, Denoiser
from dreamlite_jax.training.stage import DenoisingStage
from dreamlite_jax.training.stages.flow_matching import shares
from dreamlite_jax.training.stages.refl import spread
from dreamlite_jax.training.state import TrainState
from dreamlite_jax.training.update import Metrics, Update, step_key
from dreamlite_jax.types import Array, FeatureMap, Latent, PerSample, Scalar


class Head(nn.Module):
    """One logit a picture, real above 0, from the middle of the fake score's U-Net (DMD2 section 4.2)."""

    norm_groups: int
    norm_eps: float

    @nn.compact
    def __call__(self, features: FeatureMap) -> PerSample:
        x = nn.silu(blocks.GroupNorm(self.norm_groups, self.norm_eps, name="norm")(features.astype(jnp.float32)))
        x = nn.silu(blocks.conv(features.shape[-1], 3, dtype=jnp.float32, name="conv")(x))
        return blocks.Dense(1, jnp.float32, name="logit")(x.mean((1, 2)))[:, 0]


class Teacher(start.Random):
    """Shapes of a teacher that the config does not name."""

    def check(self) -> None:
        raise UserError("config.dmd.teacher and config.init_from are empty; distillation needs a trained teacher")

    def load(self) -> Any:
        self.check()


class DMD2Stage(DenoisingStage):
    """Distils a guided teacher into `config.model.steps` unguided steps, for both tasks in one batch.

    Beside the student, `TrainState.extra` has the fake score as `fake`, {"unet": parameters} and, with a GAN, "head",
    and its optimiser's state as `fake_opt_state`; `TrainState.frozen` has the `teacher`.
    """

    def __init__(
        self, config: TrainConfig, denoiser: Denoiser, weights: start.Weights, codec: Codec, teacher: start.Weights
    ):
        """The fake score starts as the teacher, the student with `weights`."""
        super().__init__(config, denoiser, weights, codec)
        dmd = config.dmd
        self.sources, self.frozen = {"params": weights, "teacher": teacher}, {"teacher": teacher}
        guided = guidance.is_guided(True, dmd.guidance_scale, dmd.image_guidance_scale)
        self.teacher_plan = guidance.branches(editing=True, guided=guided)  # of both tasks; `Denoiser.conditioning`
        self.gan = dmd.gan_fake_weight > 0
        self.head = Head(config.model.unet.norm_groups, config.model.unet.norm_eps)
        self.fake_update = Update(dmd.fake, config.steps * dmd.fake_updates, gather=self.gathered_fake)
        self.limits = {"diversity": (dmd.min_diversity, math.inf)}

    @classmethod
    def build(cls, config: TrainConfig, denoiser: Denoiser, codec: Codec, *, shapes_only: bool) -> "DMD2Stage":
        del shapes_only
        for name in ("guidance_scale", "image_guidance_scale"):
            if (scale := getattr(config.model, name)) != 1.0:
                raise UserError(
                    f"config.model.{name} is {scale}; a distilled model is sampled without guidance: 1.0 "
                    f"(the teacher's is config.dmd.{name})"
                )
        if config.dmd.teacher:
            teacher = start.Stored(config, denoiser.network, config.dmd.teacher, "dmd.teacher")
        elif config.init_from:
            teacher = start.unet(config, denoiser.network)
        else:
            teacher = Teacher(denoiser.network, dummy_inputs(config.model.unet), config.seed)
        student = start.unet(config, denoiser.network) if config.dmd.teacher and config.init_from else teacher
        return cls(config, denoiser, student, codec, teacher)

    def begin(self, weights: Mapping[str, Any], key: jax.Array) -> TrainState:
        fake = {"unet": start.copied(weights["teacher"])}
        if self.gan:
            width = self.config.model.unet.block_out_channels[-1]
            fake["head"] = self.head.init(key, jnp.zeros((1, 1, 1, width)))["params"]
        state = self.update.begin(start.copied(weights["params"]))
        return state.replace(extra={"fake": fake, "fake_opt_state": self.fake_update.optimizer.init(fake)})

    # --- one step

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One student update, then `fake_updates` updates of the fake score on new student samples (DMD2 alg. 1)."""
        student_key, fake_key = jax.random.split(step_key(self.config.seed, state))
        fake, teacher = self.gathered_fake(state.extra["fake"]), self.update.gather(state.frozen["teacher"])
        (loss, (generated, metrics)), grads = self.update.gradient(
            self.student_loss, state.params, fake, teacher, batch, student_key
        )
        state, metrics = self.update.apply(state, grads, {"loss": loss, **metrics})
        extra, fake_metrics = self.update_fake(
            state.extra, self.update.gather(state.params), generated, batch, fake_key
        )
        return state.replace(extra=extra), {**metrics, **fake_metrics}

    def student_loss(
        self, params: Any, fake: Any, teacher: Any, batch: Batch, key: jax.Array
    ) -> tuple[Scalar, tuple[Latent, Metrics]]:
        """½‖x - sg(x - g)‖² (mean over elements), g being the weighted matching gradient, and the generator's part of
        the GAN."""
        generate_key, level_key, noise_key = jax.random.split(key, 3)
        generated = self.generate(params, batch, generate_key)
        fixed = stop_gradient(generated)
        sigma = self.noise_levels(level_key, generated)
        noisy = flow.interpolate(generated, jax.random.normal(noise_key, generated.shape), sigma)
        fake_velocity, logits = self.fake_answer(fake, noisy if self.gan else stop_gradient(noisy), sigma, batch)
        noisy, velocity = stop_gradient(noisy), stop_gradient(fake_velocity)
        real_velocity = self.teacher_velocity(teacher, noisy, sigma, batch)
        gradient = matching_gradient(fixed, noisy, sigma, real_velocity, velocity)
        gradient *= self.weight(batch)
        loss = 0.5 * jnp.square(generated - stop_gradient(generated - gradient)).mean()
        metrics = {
            "matching_loss": loss,
            "velocity_gap": jnp.sqrt(jnp.square(real_velocity - fake_velocity).mean()),
            "diversity": spread(generated) / spread(batch["target"]),
        }
        if self.gan:
            metrics["gan_loss"] = nn.softplus(-logits).mean()
            loss += self.config.dmd.gan_generator_weight * metrics["gan_loss"]
        return loss, (generated, metrics)

    def update_fake(
        self, extra: dict[str, Any], params: Any, generated: Latent, batch: Batch, key: jax.Array
    ) -> tuple[dict[str, Any], Metrics]:
        """The fake score's updates: the first on `generated`, the others on new pictures of the same prompts.

        Every network stands in the program once, however many updates there are, because compiling them takes long (but
        see `repeat`).
        """
        generate_key, loss_key = jax.random.split(key)
        count, pictures = self.config.dmd.fake_updates, generated[None]
        if count > 1:
            keys = jax.random.split(generate_key, count - 1)
            pictures = jnp.concatenate([pictures, jax.lax.map(lambda key: self.generate(params, batch, key), keys)])

        def update(carry: Any, given: tuple[Latent, Any]) -> tuple[Any, Metrics]:
            fake, opt_state = carry
            (loss, metrics), grads = self.fake_update.gradient(self.fake_loss, fake, given[0], batch, given[1])
            fake, opt_state = optim.update(self.fake_update.optimizer, grads, opt_state, fake)
            return (fake, opt_state), {"fake_loss": loss, **metrics, "fake_grad_norm": optax.tree.norm(grads)}

        carry = extra["fake"], extra["fake_opt_state"]
        (fake, opt_state), metrics = repeat(update, carry, (pictures, jax.random.split(loss_key, count)))
        return {"fake": fake, "fake_opt_state": opt_state}, {name: values.mean() for name, values in metrics.items()}

    def fake_loss(self, fake: Any, made: Latent, batch: Batch, key: jax.Array) -> tuple[Scalar, Metrics]:
        """Flow matching on the student's pictures; with a GAN also telling them from real ones, equally noised."""
        level_key, noise_key, real_key = jax.random.split(key, 3)
        sigma = self.noise_levels(level_key, made)
        noise = jax.random.normal(noise_key, made.shape)
        noisy, wanted = flow.interpolate(made, noise, sigma), flow.velocity_target(made, noise)
        weight = self.weight(batch)
        if not self.gan:
            return (weight * jnp.square(self.fake_answer(fake, noisy, sigma, batch)[0] - wanted)).mean(), {}
        real = flow.interpolate(batch["target"], jax.random.normal(real_key, made.shape), sigma)
        _, (velocities, (logits, real_logits)) = repeat(
            lambda _, noisy: (None, self.fake_answer(fake, noisy, sigma, batch)), None, jnp.stack([noisy, real])
        )
        loss = (weight * jnp.square(velocities[0] - wanted)).mean()
        gan_loss = nn.softplus(logits).mean() + nn.softplus(-real_logits).mean()
        accuracy = 0.5 * ((logits < 0).mean() + (real_logits > 0).mean())
        return loss + self.config.dmd.gan_fake_weight * gan_loss, {"gan_fake_loss": gan_loss, "gan_accuracy": accuracy}

    def weight(self, batch: Batch) -> Array:
        """What each element counts in both losses, 1 on average over the batch; or 1 for all, ()."""
        if not self.config.dmd.region_weight:
            return jnp.ones(())
        return shares(batch, region_weight=self.config.flow.region_weight)["weight"]

    # --- the three networks

    def gathered_fake(self, fake: Any) -> Any:
        """The fake score's whole parameters: of its U-Net in the dtype it computes in, of its head in float32."""
        rest = {name: part for name, part in fake.items() if name != "unet"}
        return {"unet": self.update.gather(fake["unet"]), **sharding.gathered(rest)}

    def generate(self, params: Any, batch: Batch, key: jax.Array) -> Latent:
        """What the student predicts at one random step of its sampler, reached by its own steps (backward simulation).

        The last step has gradients, those before it have none.
        """
        target, layout = batch["target"], self.denoiser.layout
        noise_key, stop_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, target.shape)
        steps = self.config.model.steps
        sigmas = jnp.asarray(self.denoiser.sigmas(target, steps))
        stop = jax.random.randint(stop_key, (), 0, steps)
        rest = (self.denoiser.conditioning(guidance.UNGUIDED, batch), batch["size"])
        x = sampler.rollout(
            self.denoiser.velocity(stop_gradient(params)), noise, *rest, sigmas[:-1], stop, layout=layout
        )
        return sampler.predict(self.denoiser.velocity(params), stop_gradient(x), sigmas[stop], *rest, layout=layout)

    def noise_levels(self, key: jax.Array, like: Latent) -> PerSample:
        """(b,) sigmas uniform in the noise range, then shifted as the resolution wants."""
        low, high = self.config.dmd.noise_range
        mu = flow.shift_mu(self.config.model.scheduler, *like.shape[1:3])
        return flow.time_shift(jax.random.uniform(key, (like.shape[0],), minval=low, maxval=high), mu)

    def teacher_velocity(self, teacher: Any, noisy: Latent, sigma: PerSample, batch: Batch) -> Latent:
        """The teacher's velocity with guidance, single for generation and dual for edits."""
        dmd, denoiser = self.config.dmd, self.denoiser
        return sampler.guided_velocity(
            denoiser.velocity(teacher), noisy, sigma, denoiser.conditioning(self.teacher_plan, batch), batch["size"],
            dmd.guidance_scale, dmd.image_guidance_scale, denoiser.layout,
        )  # fmt: skip

    def fake_answer(self, fake: Any, noisy: Latent, sigma: PerSample, batch: Batch) -> tuple[Latent, PerSample | None]:
        """The fake score's velocity without guidance, and with a GAN the head's logits (b,)."""
        layout = self.denoiser.layout
        seen: list[Array] = []

        def velocity(*inputs: Array) -> Array:
            network = self.denoiser.network.clone(sharding=sharding.activations())
            out, state = network.apply({"params": fake["unet"]}, *inputs, capture_intermediates=is_middle)
            seen.append(state["intermediates"]["mid_block"]["__call__"][0][0])
            return out

        answer = sampler.guided_velocity(
            velocity if self.gan else self.denoiser.velocity(fake["unet"]), noisy, sigma,
            self.denoiser.conditioning(guidance.UNGUIDED, batch), batch["size"], 1.0, 1.0, layout,
        )  # fmt: skip
        if not self.gan:
            return answer, None
        features = panels.target_half(seen[0], layout)
        return answer, self.head.apply({"params": fake["head"]}, features)


def matching_gradient(
    made: Latent, noisy: Latent, sigma: PerSample, real_velocity: Latent, fake_velocity: Latent
) -> Latent:
    """[(x - mu_real) - (x - mu_fake)] / mean|x - mu_real| of each picture (DMD2 eq. 2, normalised as in DMD eq. 8)."""
    real = flow.predict_data(noisy, real_velocity, sigma)
    fake = flow.predict_data(noisy, fake_velocity, sigma)
    scale = jnp.abs(made - real).mean((1, 2, 3), keepdims=True)
    return (fake - real) / jnp.maximum(scale, 1e-6)


def repeat(function: Callable[[Any, Any], tuple[Any, Any]], carry: Any, items: Any) -> tuple[Any, Any]:
    """`jax.lax.scan`; written out on CPU, where XLA's gradients of convolutions are ten times slower in a loop."""
    if blocks.platform() != "cpu":
        return jax.lax.scan(function, carry, items)
    outputs = []
    for i in range(len(jax.tree.leaves(items)[0])):
        carry, output = function(carry, jax.tree.map(lambda x, i=i: x[i], items))
        outputs.append(output)
    return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *outputs)


def is_middle(module: nn.Module, method: str) -> bool:
    return method == "__call__" and module.path == ("mid_block",)
