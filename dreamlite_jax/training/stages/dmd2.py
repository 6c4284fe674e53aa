"""Distribution matching distillation to a few steps without guidance (DMD2, arXiv 2405.14867), in flow form.

A velocity at a noised picture x_s = (1 - s) z + s e predicts the data end mu = x_s - s v = (x_s + s² score) / (1 - s).
So the gradient of the student's divergence from its teacher, score_fake - score_real (DMD2 eq. 2), is up to a positive
factor mu_fake - mu_real = s (v_real - v_fake): the guided teacher's velocity against that of the fake score, a network
that is trained all along on what the student makes.

With `config.dmd.region_weight` both losses count more where an edit changes its picture, as flow matching's does. A
positive weight does not move the place where the two scores agree.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from dreamlite_jax.diffusion import flow, guidance, panels, sampler
from dreamlite_jax.errors import UserError
from dreamlite_jax.models import blocks
from dreamlite_jax.training import optim, sharding
from dreamlite_jax.training.config import TrainConfig
from dreamlite_jax.training.stages.latent import Batch, LatentStage, spread
from dreamlite_jax.types import Array, FeatureMap, Latent, PerSample, Scalar

Metrics = dict[str, Scalar]


@flax.struct.dataclass
class DMDState:
    """The student (params, ema, opt_state), the fake score, each with its optimiser's state, and the frozen teacher.

    `fake` is {"unet": parameters} and, with a GAN, "head".
    """

    params: Any
    ema: Any
    opt_state: Any
    step: Any
    fake: Any
    fake_opt_state: Any
    teacher: Any


class Head(nn.Module):
    """One logit a picture, real above 0, from the middle of the fake score's U-Net (DMD2 section 4.2)."""

    norm_groups: int
    norm_eps: float

    @nn.compact
    def __call__(self, features: FeatureMap) -> PerSample:
        x = nn.silu(blocks.GroupNorm(self.norm_groups, self.norm_eps, name="norm")(features.astype(jnp.float32)))
        x = nn.silu(blocks.conv(features.shape[-1], 3, dtype=jnp.float32, name="conv")(x))
        return blocks.Dense(1, jnp.float32, name="logit")(x.mean((1, 2)))[:, 0]


class DMD2Stage(LatentStage):
    """Distils a guided teacher into `config.model.steps` unguided steps, for both tasks in one batch."""

    def __init__(self, config: TrainConfig):
        super().__init__(config)
        for name in ("guidance_scale", "image_guidance_scale"):
            if (scale := getattr(config.model, name)) != 1.0:
                raise UserError(
                    f"config.model.{name} is {scale}; a distilled model is sampled without guidance: 1.0 "
                    f"(the teacher's is config.dmd.{name})"
                )
        self.setup()

    def setup(self) -> None:
        """What follows from the config alone."""
        config, dmd = self.config, self.config.dmd
        guided = guidance.is_guided(True, dmd.guidance_scale, dmd.image_guidance_scale)
        self.teacher_plan = guidance.branches(editing=True, guided=guided)  # of both tasks; see `conditioning`
        self.gan = dmd.gan_fake_weight > 0
        self.head = Head(config.model.unet.norm_groups, config.model.unet.norm_eps)
        self.optimizer = optim.optimizer(config.optim, config.steps)
        self.fake_optimizer = optim.optimizer(dmd.fake, config.steps * dmd.fake_updates)
        # (least, most) of a metric; outside them the run has collapsed and stops
        self.limits = {"diversity": (dmd.min_diversity, math.inf)}

    def init_state(self, key: jax.Array) -> DMDState:
        """The fake score starts as the teacher, the student as `init_from` (or as the teacher too)."""
        location, traced = self.config.dmd.teacher, isinstance(key, jax.core.Tracer)
        if not (location or self.config.init_from or traced):
            raise UserError("config.dmd.teacher and config.init_from are empty; distillation needs a trained teacher")
        teacher = self.params_of(location, "dmd.teacher", shapes_only=traced) if location else self.init_params(key)
        params = self.init_params(key) if self.config.init_from else teacher
        return sharding.born(self.start, params, teacher, key)

    def start(self, params: Any, teacher: Any, key: jax.Array) -> DMDState:
        """The state before the first step."""
        fake = {"unet": copy(teacher)}
        if self.gan:
            width = self.config.model.unet.block_out_channels[-1]
            fake["head"] = self.head.init(key, jnp.zeros((1, 1, 1, width)))["params"]
        return DMDState(
            copy(params), copy(params), self.optimizer.init(params), jnp.zeros((), jnp.int32),
            fake, self.fake_optimizer.init(fake), copy(teacher),
        )  # fmt: skip

    # --- one step

    def step(self, state: DMDState, batch: Batch) -> tuple[DMDState, Metrics]:
        """One update of the student, then `fake_updates` of the fake score on what the student now makes."""
        config = self.config
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        student_key, fake_key = jax.random.split(key)
        grad_fn = jax.value_and_grad(self.student_loss, has_aux=True)
        networks = self.whole(state.params), self.whole_fake(state.fake), self.whole(state.teacher)
        (loss, (made, metrics)), grads = grad_fn(*networks, batch, student_key)
        grads = sharding.owned(grads, state.params)
        params, opt_state = optim.update(self.optimizer, grads, state.opt_state, state.params)
        ema = optim.ema_update(state.ema, params, config.optim.ema_decay, state.step.astype(jnp.float32))
        fake, fake_opt_state, fake_metrics = self.follow(
            state.fake, state.fake_opt_state, self.whole(params), made, batch, fake_key
        )
        with jax.numpy_dtype_promotion("standard"):  # optax mixes floats with integers; our own arithmetic does not
            rate = jnp.asarray(optim.schedule(config.optim, config.steps)(state.step), jnp.float32)
        metrics = {
            "loss": loss,
            **metrics,
            **fake_metrics,
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(params),
            "learning_rate": rate,
        }
        return DMDState(params, ema, opt_state, state.step + 1, fake, fake_opt_state, state.teacher), metrics

    def student_loss(
        self, params: Any, fake: Any, teacher: Any, batch: Batch, key: jax.Array
    ) -> tuple[Scalar, tuple[Latent, Metrics]]:
        """½‖x - sg(x - g)‖² (mean over elements), g being the weighted matching gradient, and the generator's part of
        the GAN."""
        make_key, level_key, noise_key = jax.random.split(key, 3)
        made = self.generate(params, batch, make_key)
        sigma = self.noise_levels(level_key, made)
        noisy = flow.interpolate(made, jax.random.normal(noise_key, made.shape), sigma)
        fake_velocity, logits = self.fake_answer(fake, noisy if self.gan else still(noisy), sigma, batch)
        real_velocity = self.teacher_velocity(teacher, still(noisy), sigma, batch)
        gradient = matching_gradient(still(made), still(noisy), sigma, real_velocity, still(fake_velocity))
        gradient *= self.weight(batch)
        loss = 0.5 * jnp.square(made - still(made - gradient)).mean()
        metrics = {
            "matching_loss": loss,
            "velocity_gap": jnp.sqrt(jnp.square(real_velocity - fake_velocity).mean()),
            "diversity": spread(made) / spread(batch["target"]),
        }
        if self.gan:
            metrics["gan_loss"] = nn.softplus(-logits).mean()
            loss += self.config.dmd.gan_generator_weight * metrics["gan_loss"]
        return loss, (made, metrics)

    def follow(
        self, fake: Any, opt_state: Any, params: Any, made: Latent, batch: Batch, key: jax.Array
    ) -> tuple[Any, Any, Metrics]:
        """The fake score's updates: the first on `made`, the others on new pictures of the same prompts.

        Every network stands in the program once, however many updates there are, because compiling them takes long (but
        see `repeat`).
        """
        make_key, loss_key = jax.random.split(key)
        count, pictures = self.config.dmd.fake_updates, made[None]
        if count > 1:
            others = jax.lax.map(lambda key: self.generate(params, batch, key), jax.random.split(make_key, count - 1))
            pictures = jnp.concatenate([pictures, others])

        def update(carry: Any, given: tuple[Latent, Any]) -> tuple[Any, Metrics]:
            fake, opt_state = carry
            grad_fn = jax.value_and_grad(self.fake_loss, has_aux=True)
            (loss, metrics), grads = grad_fn(self.whole_fake(fake), given[0], batch, given[1])
            grads = sharding.owned(grads, fake)
            fake, opt_state = optim.update(self.fake_optimizer, grads, opt_state, fake)
            return (fake, opt_state), {"fake_loss": loss, **metrics, "fake_grad_norm": optax.tree.norm(grads)}

        (fake, opt_state), metrics = repeat(update, (fake, opt_state), (pictures, jax.random.split(loss_key, count)))
        return fake, opt_state, {name: values.mean() for name, values in metrics.items()}

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
        told = nn.softplus(logits).mean() + nn.softplus(-real_logits).mean()
        right = 0.5 * ((logits < 0).mean() + (real_logits > 0).mean())
        return loss + self.config.dmd.gan_fake_weight * told, {"gan_fake_loss": told, "gan_accuracy": right}

    def weight(self, batch: Batch) -> Array:
        """What each element counts in both losses, 1 on average over the batch; or 1 for all, ()."""
        return self.shares(batch)["weight"] if self.config.dmd.region_weight else jnp.ones(())

    # --- the three networks

    def whole(self, params: Any) -> Any:
        """A U-Net's parameters, gathered in the dtype that it computes in."""
        return sharding.gathered(params, jnp.dtype(self.config.dtype))

    def whole_fake(self, fake: Any) -> Any:
        """Those of the fake score, and of its head, which computes in float32."""
        rest = {name: part for name, part in fake.items() if name != "unet"}
        return {"unet": self.whole(fake["unet"]), **sharding.gathered(rest)}

    def generate(self, params: Any, batch: Batch, key: jax.Array) -> Latent:
        """What the student predicts at one random step of its sampler, reached by its own steps (backward simulation).

        The last step has gradients, those before it have none.
        """
        target, layout = batch["target"], self.config.model.unet.condition_layout
        noise_key, stop_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, target.shape)
        steps = self.config.model.steps
        sigmas = jnp.asarray(self.sigmas(target, steps))
        stop = jax.random.randint(stop_key, (), 0, steps)
        rest = (self.conditioning(guidance.UNGUIDED, batch), batch["size"])
        x = sampler.rollout(self.velocity(still(params)), noise, *rest, sigmas[:-1], stop, layout=layout)
        return sampler.predict(self.velocity(params), still(x), sigmas[stop], *rest, layout=layout)

    def noise_levels(self, key: jax.Array, like: Latent) -> PerSample:
        """(b,) sigmas uniform in the noise range, then shifted as the resolution wants."""
        low, high = self.config.dmd.noise_range
        mu = flow.shift_mu(self.config.model.scheduler, *like.shape[1:3])
        return flow.time_shift(jax.random.uniform(key, (like.shape[0],), minval=low, maxval=high), mu)

    def teacher_velocity(self, teacher: Any, noisy: Latent, sigma: PerSample, batch: Batch) -> Latent:
        """The teacher's velocity with guidance, single for generation and dual for edits."""
        dmd, model = self.config.dmd, self.config.model
        return sampler.guided_velocity(
            self.velocity(teacher), noisy, sigma, self.conditioning(self.teacher_plan, batch), batch["size"],
            dmd.guidance_scale, dmd.image_guidance_scale, model.unet.condition_layout,
        )  # fmt: skip

    def fake_answer(self, fake: Any, noisy: Latent, sigma: PerSample, batch: Batch) -> tuple[Latent, PerSample | None]:
        """The fake score's velocity without guidance, and with a GAN the head's logits (b,)."""
        layout = self.config.model.unet.condition_layout
        seen: list[Array] = []

        def velocity(*inputs: Array) -> Array:
            network = self.model.clone(sharding=sharding.activations())
            out, state = network.apply({"params": fake["unet"]}, *inputs, capture_intermediates=is_middle)
            seen.append(state["intermediates"]["mid_block"]["__call__"][0][0])
            return out

        answer = sampler.guided_velocity(
            velocity if self.gan else self.velocity(fake["unet"]), noisy, sigma,
            self.conditioning(guidance.UNGUIDED, batch), batch["size"], 1.0, 1.0, layout,
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


def still(tree: Any) -> Any:
    """Without gradients."""
    return jax.lax.stop_gradient(tree)


def copy(tree: Any) -> Any:
    """Arrays of its own: the loop donates every part of a state."""
    return jax.tree.map(jnp.copy, tree)
