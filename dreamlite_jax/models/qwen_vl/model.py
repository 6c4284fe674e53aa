"""A Qwen vision-language model as an encoder: token ids and patches to the states of its last layer.

Oracles: transformers `Qwen2VLModel`, `Qwen2_5_VLModel`, `Qwen3VLModel`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from dreamlite_jax.models.qwen_vl import rope
from dreamlite_jax.models.qwen_vl.config import QwenVLConfig
from dreamlite_jax.models.qwen_vl.text import TextTower
from dreamlite_jax.models.qwen_vl.vision import VisionTower
from dreamlite_jax.types import Array, Float, Int

STACKED = ("layers", "blocks")  # parameter names whose first axis is depth


class QwenVL(nn.Module):
    """Both towers.

    Attributes:
      config: architecture.
      dtype: of matmuls and activations; norms, softmax and rotations are float32.
      param_dtype: of stored parameters.
      remat: recompute each layer in the backward pass (gradients of rewards with respect to pixels).
      sharding: of the batch axis; pins the activations between layers on a mesh of several devices.
    """

    config: QwenVLConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    remat: bool = False
    sharding: NamedSharding | None = None

    def setup(self):
        common = (self.dtype, self.param_dtype, self.remat, self.sharding)
        self.visual = VisionTower(self.config.vision, *common)
        self.language_model = TextTower(self.config.text, *common)

    def __call__(
        self,
        ids: Int[Array, "b s"],
        mask: Array,
        positions: Int[Array, "3 b s"],
        patches: Float[Array, "b m n p"] | None = None,
        grid: rope.Grid | None = None,
    ) -> Float[Array, "b s d"]:
        """The last layer's states, normalised if `config.text.final_norm`.

        Args:
          mask: (b, s), above 0 = keep.
          positions: from `rope.text_positions` or `rope.multimodal_positions`.
          patches: m images a sample in the order of their image tokens, all of one `grid` (`vision.patchify`).
        """
        if patches is None:
            return self.language_model(self.language_model.embed(ids), positions, mask)
        return self.read(ids, mask, positions, *self.see(patches, grid))

    def example(self) -> tuple[np.ndarray, ...]:
        """The smallest inputs, for `init`: one image token."""
        vision = self.config.vision
        ids = np.full((1, 1), self.config.image_token_id, np.int32)
        patches = np.zeros((1, 1, vision.merge_unit, vision.patch_dim), np.float32)
        return ids, np.ones((1, 1), np.int32), np.zeros((3, 1, 1), np.int32), patches

    def see(
        self, patches: Float[Array, "b m n p"], grid: rope.Grid
    ) -> tuple[Float[Array, "b t d"], Float[Array, "l b t d"]]:
        """Image tokens of all m images of a sample one after another, and their l deepstack features."""
        batch, images, count, width = patches.shape
        tokens, taps = self.visual(patches.reshape(batch * images, count, width), grid)
        joined = (batch, images * tokens.shape[1], tokens.shape[2])
        return tokens.reshape(joined), taps.reshape(len(taps), *joined)

    def read(
        self,
        ids: Int[Array, "b s"],
        mask: Array,
        positions: Int[Array, "3 b s"],
        tokens: Float[Array, "b t d"],
        taps: Float[Array, "l b t d"],
    ) -> Float[Array, "b s d"]:
        """As the call, of a text with what `see` saw at its image tokens, in their order."""
        x = self.language_model.embed(ids)
        is_image = ids == self.config.image_token_id
        order = jnp.maximum(jnp.cumsum(is_image, -1) - 1, 0)[..., None]

        def at_image_tokens(features: Array, elsewhere: Array) -> Array:
            return jnp.where(is_image[..., None], jnp.take_along_axis(features.astype(x.dtype), order, 1), elsewhere)

        x = at_image_tokens(tokens, x)
        deepstack = jax.vmap(lambda tap: at_image_tokens(tap, jnp.zeros_like(x)))(taps)
        return self.language_model(x, positions, mask, deepstack)


def abstract_params(model: QwenVL) -> Any:
    """Shapes and dtypes of the parameters, without allocating them."""
    side = model.config.vision.spatial_merge_size
    return jax.eval_shape(lambda *x: model.init(jax.random.key(0), *x, (side, side)), *model.example())["params"]


def param_shardings(params: Any, mesh: Mesh, axis: str = "fsdp") -> Any:
    """Shardings that split the widest divisible axis of every matrix over mesh axis `axis` and replicate the rest.

    The depth axis of a stack stays whole: the scan takes one layer a step, on all devices at once.
    """
    size = mesh.shape[axis]

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        first = 1 if any(getattr(key, "key", None) in STACKED for key in path) else 0
        axes = [i for i in range(first, leaf.ndim) if leaf.shape[i] % size == 0]
        spec = [None] * leaf.ndim
        if axes and leaf.ndim - first > 1:
            spec[max(axes, key=lambda i: leaf.shape[i])] = axis
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(sharding, params)
