"""A config's stage and batches as shapes alone, for compiles and checks where there are no data and no devices."""

import dataclasses

import jax
import numpy as np

from dreamlite_jax.config import check_image_size
from dreamlite_jax.text.templates import EDIT_CHAT
from dreamlite_jax.train import stage_class
from dreamlite_jax.training.config import TrainConfig
from dreamlite_jax.training.loop import Stage
from dreamlite_jax.training.stages.latent import Facts, LatentStage


def abstract_stage(config: TrainConfig) -> Stage:
    """The stage of a config whose data, autoencoder, judges and models to start from need not be here.

    Its `init_state` and `step` have the shapes and, but for the states of the empty prompt, the program of the real
    one. It has no data, grids or export.
    """
    kind = stage_class(config)
    if issubclass(kind, LatentStage):
        kind = type(kind.__name__, (_WithoutData, kind), {})
    return kind(dataclasses.replace(config, init_from="", dmd=dataclasses.replace(config.dmd, teacher="")))


class _WithoutData:
    config: TrainConfig

    def facts(self) -> Facts:
        model = self.config.model
        tail = EDIT_CHAT.closing_tokens if model.text.encoder == "qwen3_vl" else 0
        return Facts(model.vae, None, np.zeros((1, model.unet.text_dim), np.float32), tail)


def abstract_batch(stage: Stage, width: int = 0, height: int = 0) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a global batch of pictures of this size in pixels (default: the square of the config's buckets).

    Raises:
      UserError: the network cannot take pictures of this size.
    """
    model, data = stage.config.model, stage.config.data
    native = data.buckets.size or model.native_size
    size = width or native, height or native
    check_image_size(model, *size)
    fields = stage.empty_batch(size).items()
    return {name: jax.ShapeDtypeStruct((data.batch_size, *x.shape[1:]), x.dtype) for name, x in fields}
