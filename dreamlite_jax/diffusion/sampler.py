"""The sampler: Euler steps over a schedule as one scan, guidance branches as one batch. Jitted by its callers."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dreamlite_jax.diffusion import flow, guidance, panels
from dreamlite_jax.types import Array, Float, Int, Latent, PerSample, TextMask, TextStates, TimeIds

# (canvas, timestep, text, mask, time_ids) -> velocity of the canvas
VelocityFn = Callable[[Array, Array, Array, Array, Array], Array]


class Conditioning(NamedTuple):
    """What each guidance branch sees; the leading axis is the branch."""

    text: Float[Array, "g b s d"]
    mask: Float[Array, "g b s"]
    image: Float[Array, "g b h w c"]


class TextStatesMask(NamedTuple):
    """Encoded prompts of a batch."""

    states: TextStates
    mask: TextMask


def condition(
    plan: Sequence[guidance.Branch],
    prompt: TextStatesMask,
    null: TextStatesMask,
    source: Latent,
) -> Conditioning:
    """Conditioning of a plan.

    Args:
      null: the empty prompt, which an encoder that sees pictures reads beside the source when editing.
      source: the source's latents when editing, zeros when generating.
    """
    seen = [prompt if branch.text else null for branch in plan]
    images = [source if branch.image else panels.blank_like(source) for branch in plan]
    return Conditioning(
        jnp.stack([jnp.broadcast_to(text.states, prompt.states.shape) for text in seen]),
        jnp.stack([jnp.broadcast_to(text.mask, prompt.mask.shape) for text in seen]),
        jnp.stack(images),
    )


def guided_velocity(
    velocity: VelocityFn,
    x: Latent,
    sigma: Float[Array, ""] | PerSample,
    conditioning: Conditioning,
    time_ids: TimeIds,
    guidance_scale: Float[Array, ""] | float,
    image_guidance_scale: Float[Array, ""] | float,
    layout: panels.Layout = "width",
) -> Latent:
    """Velocity of the target panel at one sigma, or one a sample; all branches in one call of the network."""
    g, b = conditioning.text.shape[:2]

    def merge(a: Array) -> Array:
        return a.reshape((g * b, *a.shape[2:]))

    canvas = panels.compose(jnp.broadcast_to(x, (g, *x.shape)).reshape((g * b, *x.shape[1:])),
                            merge(conditioning.image), layout)  # fmt: skip
    timestep = jnp.broadcast_to(jnp.asarray(flow.TIMESTEPS * sigma, jnp.float32), (g, b)).reshape(g * b)
    sizes = jnp.broadcast_to(time_ids, (g, b, 2)).reshape(g * b, 2)
    out = velocity(canvas, timestep, merge(conditioning.text), merge(conditioning.mask), sizes)
    out = panels.target_half(out, layout)
    return guidance.combine(out.reshape((g, b, *out.shape[1:])), guidance_scale, image_guidance_scale)


def sample(
    velocity: VelocityFn,
    noise: Latent,
    conditioning: Conditioning,
    time_ids: TimeIds,
    sigmas: Float[Array, "steps1"],
    guidance_scale: Float[Array, ""] | float = 1.0,
    image_guidance_scale: Float[Array, ""] | float = 1.0,
    *,
    layout: panels.Layout = "width",
) -> tuple[Latent, Float[Array, "steps b h w c"]]:
    """Integrates from noise at sigmas[0] to data at sigmas[-1] = 0.

    Returns:
      Final latents, and the data predicted at each step (for previews; unused outputs cost nothing under jit).
    """

    def step(x: Latent, pair: tuple[Array, Array]) -> tuple[Latent, Latent]:
        now, after = pair
        v = guided_velocity(velocity, x, now, conditioning, time_ids, guidance_scale, image_guidance_scale, layout)
        batch = jnp.full((x.shape[0],), 1.0, x.dtype)
        return flow.euler_step(x, v, now * batch, after * batch), flow.predict_data(x, v, now * batch)

    return jax.lax.scan(step, noise, (sigmas[:-1], sigmas[1:]))


def rollout(
    velocity: VelocityFn,
    noise: Latent,
    conditioning: Conditioning,
    time_ids: TimeIds,
    sigmas: Float[Array, "steps1"],
    stop: Int[Array, ""] | int,
    guidance_scale: Float[Array, ""] | float = 1.0,
    image_guidance_scale: Float[Array, ""] | float = 1.0,
    *,
    layout: panels.Layout = "width",
) -> Latent:
    """Where the sampler is after `stop` of its steps, at sigmas[stop]; `stop` may be known on the device alone.

    These are steps of `sample`: those after `stop` have length zero and do not call the network.
    """
    sigma = jnp.asarray(sigmas)[stop]

    def until_stop(canvas: Array, timestep: Array, *inputs: Array) -> Array:
        shape = jax.eval_shape(velocity, canvas, timestep, *inputs)
        return jax.lax.cond(
            timestep[0] > flow.TIMESTEPS * sigma,
            velocity,
            lambda *_: jnp.zeros(shape.shape, shape.dtype),
            canvas, timestep, *inputs,
        )  # fmt: skip

    schedule = jnp.maximum(sigmas, sigma)
    return sample(
        until_stop, noise, conditioning, time_ids, schedule, guidance_scale, image_guidance_scale, layout=layout
    )[0]


def predict(
    velocity: VelocityFn,
    x: Latent,
    sigma: Float[Array, ""],
    conditioning: Conditioning,
    time_ids: TimeIds,
    guidance_scale: Float[Array, ""] | float = 1.0,
    image_guidance_scale: Float[Array, ""] | float = 1.0,
    *,
    layout: panels.Layout = "width",
) -> Latent:
    """Data that the (guided) velocity at x predicts: what a step of `sample` shows as its preview."""
    v = guided_velocity(velocity, x, sigma, conditioning, time_ids, guidance_scale, image_guidance_scale, layout)
    return flow.predict_data(x, v, jnp.full((x.shape[0],), sigma, x.dtype))


def noise_from_seeds(seeds: Sequence[int], shape: tuple[int, int, int]) -> Latent:
    """(b, h, w, c) standard normal; each image's noise depends on its own seed alone, whatever the batch."""
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)
