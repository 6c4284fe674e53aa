"""Flow-matching training of the U-Net: T2I, edit, joint and SFT are this stage with different data (spec section 6)."""

from typing import Any

import jax
import jax.numpy as jnp

from dreamlite_jax.training.denoiser import Batch, Noised
from dreamlite_jax.training.stage import DenoisingStage
from dreamlite_jax.training.update import Metrics
from dreamlite_jax.types import Array, Latent, Scalar


class FlowMatchingStage(DenoisingStage):
    """Velocity regression on the target panel, the condition panel clean beside it."""

    accumulates = True
    encodes = True

    def draw(self, batch: Batch, key: jax.Array) -> tuple[Noised, dict[str, Array]]:
        return self.denoiser.noised(batch, key), shares(batch, region_weight=self.config.flow.region_weight)

    def mean_loss(self, params: Any, rows: tuple[Noised, dict[str, Array]]) -> tuple[Scalar, Metrics]:
        noised, weights = rows
        return velocity_loss(self.denoiser.predicted_velocity(params, noised), noised, weights)


def shares(batch: Batch, *, region_weight: bool) -> dict[str, Array]:
    """What each item and latent pixel weighs in the means of `velocity_loss`: 1 on average over the batch."""
    weight = batch["weight"] if region_weight else jnp.ones_like(batch["weight"])
    editing, b = batch["editing"], len(batch["editing"])
    return {
        "weight": weight / weight.mean(),
        "generate": (1.0 - editing) * b / jnp.maximum(b - editing.sum(), 1.0),
        "edit": editing * b / jnp.maximum(editing.sum(), 1.0),
    }


def velocity_loss(predicted: Latent, noised: Noised, weights: dict[str, Array]) -> tuple[Scalar, Metrics]:
    """Squared error of the velocity on the target panel, weighted on the region that an edit changes.

    With the `shares` of a batch it is a plain mean over items: the mean over parts of a batch is that of the batch.
    """
    error = jnp.square(predicted - noised.velocity)
    per_item = error.mean((1, 2, 3))
    return (weights["weight"] * error).mean(), {
        "mse": error.mean(),
        "mse_generate": (per_item * weights["generate"]).mean(),
        "mse_edit": (per_item * weights["edit"]).mean(),
    }
