"""Flow matching (spec section 5): path, target, schedule, Euler step. Training, sampling and export share it.

sigma runs from 0 (data) to 1 (noise); the network's timestep is 1000 · sigma.
"""

import jax

from dreamlite_jax.diffusion.schedule import TIMESTEPS, sampling_sigmas, shift_mu, time_shift
from dreamlite_jax.types import Array, Latent, PerSample, PRNGKeyArray

__all__ = [
    "TIMESTEPS",
    "euler_step",
    "interpolate",
    "per_sample",
    "predict_data",
    "sampling_sigmas",
    "shift_mu",
    "time_shift",
    "training_sigmas",
    "velocity_target",
]


def per_sample(x: Array, like: Array) -> Array:
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


def training_sigmas(
    key: PRNGKeyArray, batch: int, *, mu: float, logit_mean: float = 0.0, logit_std: float = 1.0
) -> PerSample:
    """Logit-normal sigmas with the resolution's time shift (paper section 4; logit-normal as in SD3)."""
    normal = logit_mean + logit_std * jax.random.normal(key, (batch,))
    return time_shift(jax.nn.sigmoid(normal), mu)
