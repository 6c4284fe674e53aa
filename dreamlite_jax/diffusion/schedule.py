"""The sampling schedule (spec section 5) in plain numpy, shared by `flow` and by the runtime that has no JAX."""

import numpy as np

from dreamlite_jax.config import SchedulerConfig
from dreamlite_jax.errors import UserError

TIMESTEPS = 1000.0  # the network's timestep is this times sigma


def shift_mu(scheduler: SchedulerConfig, latent_height: int, latent_width: int) -> float:
    """mu of one panel: linear in its number of 2x2 patches (oracle: `calculate_shift` of the released pipelines)."""
    seq = latent_height * latent_width / 4
    slope = (scheduler.max_shift - scheduler.base_shift) / (scheduler.max_seq_len - scheduler.base_seq_len)
    return scheduler.base_shift + slope * (seq - scheduler.base_seq_len)


def time_shift(sigma, mu: float):
    """exp(mu) / (exp(mu) + 1/sigma - 1) of an array of any library, written so that sigma = 0 gives 0."""
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
