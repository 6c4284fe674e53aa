"""Flow matching (spec section 5): path, target, time shift, schedule, Euler step. Training, sampling and export share it.

sigma runs from 0 (data) to 1 (noise); the network's timestep is 1000 · sigma.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dreamlite_jax.config import SchedulerConfig
from dreamlite_jax.errors import UserError
from dreamlite_jax.types import Array, Float, Latent, PerSample, PRNGKeyArray

TIMESTEPS = 1000.0


def per_sample(x: PerSample, like: Array) -> Array:
    """(b,) with trailing axes, to broadcast against `like`."""
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))


def interpolate(data: Latent, noise: Latent, sigma: PerSample) -> Latent:
    """x_sigma = (1 - sigma) · data + sigma · noise."""
    sigma = per_sample(sigma, data)
    return (1.0 - sigma) * data + sigma * noise


def velocity_target(data: Latent, noise: Latent) -> Latent:
    """dx/dsigma along the straight path: noise - data."""
    return noise - data


def predict_data(x: Latent, velocity: Latent, sigma: PerSample) -> Latent:
    """Data end of the straight line through x with this velocity: x - sigma · v."""
    return x - per_sample(sigma, x) * velocity


def euler_step(x: Latent, velocity: Latent, sigma: PerSample, sigma_next: PerSample) -> Latent:
    """x + (sigma_next - sigma) · v."""
    return x + per_sample(sigma_next - sigma, x) * velocity


def shift_mu(scheduler: SchedulerConfig, latent_height: int, latent_width: int) -> float:
    """mu of one panel: linear in its number of 2x2 patches (oracle: `calculate_shift` of the released pipelines)."""
    seq = latent_height * latent_width / 4
    slope = (scheduler.max_shift - scheduler.base_shift) / (scheduler.max_seq_len - scheduler.base_seq_len)
    return scheduler.base_shift + slope * (seq - scheduler.base_seq_len)


def time_shift(sigma: Float[Array, "..."], mu: float) -> Float[Array, "..."]:
    """exp(mu) / (exp(mu) + 1/sigma - 1), written so that sigma = 0 gives 0."""
    scale = np.exp(mu)
    return scale * sigma / (1.0 + (scale - 1.0) * sigma)


def sampling_sigmas(steps: int, mu: float) -> np.ndarray:
    """(steps + 1,) float32: linspace(1, 1/steps, steps), shifted by mu, then 0.

    Raises:
      UserError: fewer than one step.
    """
    if steps < 1:
        raise UserError(f"steps is {steps}; it must be at least 1")
    sigmas = time_shift(np.linspace(1.0, 1.0 / steps, steps), mu)
    return np.append(sigmas, 0.0).astype(np.float32)


def training_sigmas(
    key: PRNGKeyArray, batch: int, *, mu: float, logit_mean: float = 0.0, logit_std: float = 1.0
) -> PerSample:
    """Logit-normal sigmas with the resolution's time shift (paper section 4; logit-normal as in SD3)."""
    normal = logit_mean + logit_std * jax.random.normal(key, (batch,))
    return time_shift(jax.nn.sigmoid(normal), mu)
