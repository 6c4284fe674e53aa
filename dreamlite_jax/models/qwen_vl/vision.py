"""Vision tower of Qwen3-VL (oracle: transformers `Qwen3VLVisionModel`), and pixels to its patches."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from dreamlite_jax.models.qwen_vl import layers, rope
from dreamlite_jax.models.qwen_vl.config import VisionTowerConfig
from dreamlite_jax.types import Array, Float

NORM_EPS = 1e-6


def patchify(images, config: VisionTowerConfig):
    """Normalised images (b, H, W, 3) to patches (b, n, patch_dim), in the order of `rope.patch_order`.

    Takes numpy on the host and JAX in a differentiated function alike. A still image fills all
    `temporal_patch_size` frames of a patch. Oracle: `Qwen2VLImageProcessorPil.patchify`.
    """
    patch, merge = config.patch_size, config.spatial_merge_size
    batch, height, width, channels = images.shape
    blocks = images.reshape(
        batch, height // (patch * merge), merge, patch, width // (patch * merge), merge, patch, channels
    )
    frames = blocks.transpose(0, 1, 4, 2, 5, 7, 3, 6)[:, :, :, :, :, :, None].repeat(config.temporal_patch_size, 6)
    return frames.reshape(batch, (height // patch) * (width // patch), config.patch_dim)


class VisionAttention(nn.Module):
    """Full self-attention over the patches of one image."""

    config: VisionTowerConfig
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], cos: Array, sin: Array) -> Float[Array, "b n d"]:
        batch, patches, width = x.shape
        qkv = nn.Dense(3 * width, dtype=self.dtype, param_dtype=self.param_dtype, name="qkv")(x)
        qkv = qkv.reshape(batch, patches, 3, self.config.num_heads, width // self.config.num_heads)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        out = layers.attention(rope.rotate(q, cos, sin), rope.rotate(k, cos, sin), v).reshape(x.shape)
        return nn.Dense(width, dtype=self.dtype, param_dtype=self.param_dtype, name="proj")(out)


class VisionMLP(nn.Module):
    """Two dense layers with the tanh form of GELU."""

    features: int
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        hidden = nn.Dense(self.features, dtype=self.dtype, param_dtype=self.param_dtype, name="linear_fc1")(x)
        hidden = nn.gelu(hidden, approximate=True)
        return nn.Dense(x.shape[-1], dtype=self.dtype, param_dtype=self.param_dtype, name="linear_fc2")(hidden)


class VisionBlock(nn.Module):
    """Pre-norm transformer block."""

    config: VisionTowerConfig
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, cos: Array, sin: Array) -> Array:
        config, dtypes = self.config, (self.dtype, self.param_dtype)
        y = layers.LayerNorm(NORM_EPS, self.param_dtype, name="norm1")(x)
        x = x + VisionAttention(config, *dtypes, name="attn")(y, cos, sin)
        y = layers.LayerNorm(NORM_EPS, self.param_dtype, name="norm2")(x)
        return x + VisionMLP(config.intermediate_size, *dtypes, name="mlp")(y)


class PatchMerger(nn.Module):
    """Joins each block of neighbouring patches into one text token, through an MLP with exact GELU.

    `norm_after` says whether the LayerNorm sees a patch (the last merger) or the joined patches (deepstack).
    """

    config: VisionTowerConfig
    norm_after: bool
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b t o"]:
        batch, patches, width = x.shape
        unit = self.config.merge_unit
        joined = (batch, patches // unit, unit * width)
        norm = layers.LayerNorm(NORM_EPS, self.param_dtype, name="norm")
        x = norm(x.reshape(joined)) if self.norm_after else norm(x).reshape(joined)

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, param_dtype=self.param_dtype, name=name)

        hidden = nn.gelu(dense(unit * width, "linear_fc1")(x), approximate=False)
        return dense(self.config.out_hidden_size, "linear_fc2")(hidden)


class VisionTower(nn.Module):
    """Images of one grid size to text tokens; attributes as in `QwenVL`."""

    config: VisionTowerConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    remat: bool = False
    sharding: jax.sharding.NamedSharding | None = None

    @nn.compact
    def __call__(
        self, patches: Float[Array, "b n p"], grid: rope.Grid
    ) -> tuple[Float[Array, "b t o"], Float[Array, "m b t o"]]:
        """Tokens, and the m deepstack features that go with them, of images cut into `grid` patches (`patchify`).

        The patch embedding is a dense layer on flattened patches: the same numbers as the oracle's Conv3d whose stride
        is its kernel, and on CPU a backward pass a hundred times faster.
        """
        config, dtypes = self.config, (self.dtype, self.param_dtype)
        x = PatchEmbed(config, *dtypes, name="patch_embed")(patches.astype(self.dtype))
        x = x + self._positions(grid)[None].astype(x.dtype)
        head_dim = config.hidden_size // config.num_heads
        angles = rope.axial_rope(grid, config.spatial_merge_size, head_dim, config.rope_theta)
        cos, sin = (jnp.asarray(part)[None] for part in angles)

        block = VisionBlock(config, *dtypes, parent=None)
        example = (jnp.zeros((1, 1, config.hidden_size), self.dtype), cos[:, :1], sin[:, :1])
        stack = self.param("blocks", layers.init_stack, block, config.depth, *example)
        bounds = (0, *(tap + 1 for tap in config.deepstack_indexes), config.depth)
        taps = []
        for i, blocks in enumerate(itertools.pairwise(bounds)):
            if blocks[0] < blocks[1]:
                x = layers.run_stack(block, stack, x, cos, sin, blocks=blocks, remat=self.remat, sharding=self.sharding)
            if i < len(config.deepstack_indexes):
                taps.append(PatchMerger(config, True, *dtypes, name=f"deepstack_merger_list_{i}")(x))
        tokens = PatchMerger(config, False, *dtypes, name="merger")(x)
        return tokens, jnp.stack(taps) if taps else jnp.zeros((0, *tokens.shape), tokens.dtype)

    def _positions(self, grid: rope.Grid) -> Float[Array, "n d"]:
        """The learned positions resampled to `grid`, float32."""
        config = self.config
        table = nn.Embed(
            config.num_position_embeddings, config.hidden_size, param_dtype=self.param_dtype, name="pos_embed"
        )
        indices, weights = rope.position_taps(grid, config.spatial_merge_size, config.position_side)
        taps = table(jnp.asarray(indices.astype(np.int32))).astype(jnp.float32)
        return (taps * weights[..., None]).sum(1)


class PatchEmbed(nn.Module):
    """One dense layer on flattened patches."""

    config: VisionTowerConfig
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, patches: Float[Array, "b n p"]) -> Float[Array, "b n d"]:
        return nn.Dense(self.config.hidden_size, dtype=self.dtype, param_dtype=self.param_dtype, name="proj")(patches)
