"""Flow-matching training of the U-Net: T2I, edit, joint and SFT are this stage with different data (spec section 6)."""

from typing import Any

import jax

from dreamlite_jax.training.stages.latent import Batch, LatentStage
from dreamlite_jax.training.state import OneLoss


class FlowMatchingStage(LatentStage, OneLoss):
    """Velocity regression on the target panel, the condition panel clean beside it."""

    def loss(self, params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(loss, metrics) of one batch; see `LatentStage.flow_loss`."""
        noised = self.noised(batch, key)
        return self.flow_loss(self.answer(params, noised), noised, batch)
