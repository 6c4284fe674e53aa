"""A config's stage and batches as shapes alone, for compiles and checks where there are no data and no devices."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dreamlite_jax.config import check_image_size
from dreamlite_jax.train import stage_class
from dreamlite_jax.training.config import TrainConfig
from dreamlite_jax.training.loop import Stage
from dreamlite_jax.training.stages.latent import Facts, LatentStage


def abstract_stage(config: TrainConfig) -> Stage:
    """The stage of a config whose data, autoencoder and start model need not be here.

    Its `init_state` and `step` have the shapes and, but for the states of the empty prompt, the program of the real
    one. It has no data, grids or export.
    """
    kind = stage_class(config)
    if issubclass(kind, LatentStage):
        kind = type(kind.__name__, (_WithoutData, kind), {})
    return kind(dataclasses.replace(config, init_from=""))


class _WithoutData:
    config: TrainConfig

    def facts(self) -> Facts:
        return Facts(self.config.model.vae, None, np.zeros((1, self.config.model.unet.text_dim), np.float32))


def abstract_batch(config: TrainConfig, width: int = 0, height: int = 0) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a global batch of pictures of this size in pixels (default: the square of the config's buckets).

    Raises:
      UserError: the network cannot take pictures of this size.
    """
    model, data = config.model, config.data
    native = data.buckets.size or model.native_size
    width, height = width or native, height or native
    check_image_size(model, width, height)

    def floats(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((data.batch_size, *shape), jnp.float32)

    if config.stage == "vae":
        return {"image": floats(height, width, 3)}
    h, w, c = height // model.vae.downsampling, width // model.vae.downsampling, model.vae.latent_channels
    return {
        "target": floats(h, w, c),
        "source": floats(h, w, c),
        "weight": floats(h, w, 1),
        "text": floats(data.text_length, model.unet.text_dim),
        "mask": floats(data.text_length),
        "editing": floats(),
        "size": floats(2),
    }


def parameter_count(state: Any) -> int:
    """Of the network that a state trains."""
    return sum(x.size for x in jax.tree.leaves(state.params))
