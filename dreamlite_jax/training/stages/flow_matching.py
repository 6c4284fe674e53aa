"""Flow-matching training of the U-Net: T2I, edit, joint and SFT are this stage with different data (spec section 6)."""

from typing import Any

import jax

from dreamlite_jax.training import flops
from dreamlite_jax.training.stages.latent import Batch, LatentStage, Noised
from dreamlite_jax.training.state import OneLoss, TrainState


class FlowMatchingStage(LatentStage, OneLoss):
    """Velocity regression on the target panel, the condition panel clean beside it."""

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        """One optimisation step, on latents or on pictures that it encodes first."""
        return super().step(state, self.encoded(batch))

    def loss(self, params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(loss, metrics) of one batch; see `LatentStage.flow_loss`."""
        return self.mean_loss(params, self.draw(batch, key))

    def draw(self, batch: Batch, key: jax.Array) -> tuple[Noised, dict[str, jax.Array]]:
        """All that is random, and all that looks over the whole batch (see `training.state.Parts`)."""
        return self.noised(batch, key), self.shares(batch)

    def mean_loss(
        self, params: Any, items: tuple[Noised, dict[str, jax.Array]]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(loss, metrics) as means over some of the batch's items."""
        noised, shares = items
        return self.mean_flow_loss(self.answer(params, noised), noised, shares)

    def flops(self, batch: Batch) -> float:
        """Of one step on a batch of these shapes: forward and backward pass of the U-Net on each canvas."""
        unet, (b, h, w, _) = self.config.model.unet, batch["weight"].shape
        columns = 2 * w if unet.condition_layout == "width" else w
        return flops.training_flops(unet, b, h, columns, batch["text"].shape[1])
