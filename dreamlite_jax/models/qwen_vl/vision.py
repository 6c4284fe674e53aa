"""Vision towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, and pixels to their patches.

Oracles: transformers `Qwen2VisionTransformerPretrainedModel`, `Qwen2_5_VisionTransformerPretrainedModel`,
`Qwen3VLVisionModel`. Names are those of their checkpoints, so they differ where these do.
"""

import dataclasses
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


def norm(config: VisionTowerConfig, param_dtype: DTypeLike, name: str) -> nn.Module:
    """The family's normalisation."""
    kind = layers.RMSNorm if config.family == "qwen2_5_vl" else layers.LayerNorm
    return kind(NORM_EPS, param_dtype, name=name)


def quick_gelu(x: Array) -> Array:
    """x · sigmoid(1.702 x)."""
    return x * nn.sigmoid(1.702 * x)


class VisionAttention(nn.Module):
    """Self-attention over the patches of one image, or within each `window` of consecutive ones (0: no windows)."""

    config: VisionTowerConfig
    window: int
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], cos: Array, sin: Array, bias: Array | None) -> Float[Array, "b n d"]:
        batch, patches, width = x.shape
        qkv = nn.Dense(3 * width, dtype=self.dtype, param_dtype=self.param_dtype, name="qkv")(x)
        qkv = qkv.reshape(batch, patches, 3, self.config.num_heads, width // self.config.num_heads)
        q, k, v = rope.rotate(qkv[:, :, 0], cos, sin), rope.rotate(qkv[:, :, 1], cos, sin), qkv[:, :, 2]
        if self.window:
            q, k, v = (part.reshape(-1, self.window, *part.shape[2:]) for part in (q, k, v))
            if bias is not None:  # (1, 1, 1, 1, n) -> (b · windows, 1, 1, 1, window)
                bias = jnp.tile(bias.reshape(-1, 1, 1, 1, self.window), (batch, 1, 1, 1, 1))
        out = layers.attention(q, k, v, bias).reshape(x.shape)
        return nn.Dense(width, dtype=self.dtype, param_dtype=self.param_dtype, name="proj")(out)


class VisionMLP(nn.Module):
    """Two dense layers with the family's GELU between."""

    config: VisionTowerConfig
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        newest = self.config.family == "qwen3_vl"
        names = ("linear_fc1", "linear_fc2") if newest else ("fc1", "fc2")

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, param_dtype=self.param_dtype, name=name)

        hidden = dense(self.config.intermediate_size, names[0])(x)
        return dense(x.shape[-1], names[1])(nn.gelu(hidden, approximate=True) if newest else quick_gelu(hidden))


class VisionBlock(nn.Module):
    """Pre-norm transformer block."""

    config: VisionTowerConfig
    window: int
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, cos: Array, sin: Array, bias: Array | None) -> Array:
        config, dtypes = self.config, (self.dtype, self.param_dtype)
        y = norm(config, self.param_dtype, "norm1")(x)
        x = x + VisionAttention(config, self.window, *dtypes, name="attn")(y, cos, sin, bias)
        y = norm(config, self.param_dtype, "norm2")(x)
        if config.family == "qwen2_5_vl":
            return x + layers.GatedMLP(config.intermediate_size, True, *dtypes, name="mlp")(y)
        return x + VisionMLP(config, *dtypes, name="mlp")(y)


class PatchMerger(nn.Module):
    """Joins each block of neighbouring patches into one text token, through an MLP with exact GELU.

    `norm_after` says whether the norm sees a patch (the last merger) or the joined patches (deepstack).
    """

    config: VisionTowerConfig
    norm_after: bool
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b t o"]:
        config = self.config
        batch, patches, width = x.shape
        joined = (batch, patches // config.merge_unit, config.merge_unit * width)
        newest = config.family == "qwen3_vl"
        names = ("norm", "linear_fc1", "linear_fc2") if newest else ("ln_q", "mlp_0", "mlp_2")
        normalise = norm(config, self.param_dtype, names[0])
        x = normalise(x.reshape(joined)) if self.norm_after else normalise(x).reshape(joined)

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, param_dtype=self.param_dtype, name=name)

        hidden = nn.gelu(dense(joined[-1], names[1])(x), approximate=False)
        return dense(config.out_hidden_size, names[2])(hidden)


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
        if config.num_position_embeddings:
            x = x + self._positions(grid)[None].astype(x.dtype)
        angles = rope.axial_rope(
            grid, config.spatial_merge_size, config.hidden_size // config.num_heads, config.rope_theta
        )
        slots = Slots.of(config, grid)
        x, cos, sin = slots.take(x), *(slots.take(jnp.asarray(part)[None]) for part in angles)
        bias = slots.bias()

        def block(window: int) -> VisionBlock:
            return VisionBlock(config, window, *dtypes, parent=None)

        example = (jnp.zeros((1, 1, config.hidden_size), self.dtype), cos[:, :1], sin[:, :1], None)
        stack = self.param("blocks", layers.init_stack, block(0), config.depth, *example)
        taps = []
        for first, stop, windowed in alike(config):
            x = layers.run_stack(
                block(slots.window if windowed else 0), stack, x, cos, sin, bias, blocks=(first, stop),
                remat=self.remat, sharding=self.sharding,
            )  # fmt: skip
            if stop - 1 in config.deepstack_indexes:
                name = f"deepstack_merger_list_{config.deepstack_indexes.index(stop - 1)}"
                taps.append(PatchMerger(config, True, *dtypes, name=name)(x))
        tokens = slots.give_back(PatchMerger(config, False, *dtypes, name="merger")(x))
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


def alike(config: VisionTowerConfig) -> list[tuple[int, int, bool]]:
    """Runs of blocks [first, stop) that one scan can take, cut after every tap, and whether they attend in windows."""
    windowed = [config.window_side > 0 and i not in config.full_blocks for i in range(config.depth)]
    cuts = {0, config.depth, *(tap + 1 for tap in config.deepstack_indexes)}
    cuts |= {i for i in range(1, config.depth) if windowed[i] != windowed[i - 1]}
    return [(first, stop, windowed[first]) for first, stop in itertools.pairwise(sorted(cuts))]


@dataclasses.dataclass(frozen=True)
class Slots:
    """The order in which a tower without, or with, attention windows holds its patches.

    Attributes:
      patches: (m,) index of the patch in each slot; None: as they come.
      kept: (m,) whether the slot holds a patch, or only fills a window that reaches over the edge.
      window: slots of one window.
      merge_unit: patches that become one token; they stay together.
    """

    patches: np.ndarray | None = None
    kept: np.ndarray | None = None
    window: int = 0
    merge_unit: int = 1

    @classmethod
    def of(cls, config: VisionTowerConfig, grid: rope.Grid) -> "Slots":
        if not config.window_side:
            return cls()
        unit = config.merge_unit
        units, kept = rope.window_slots(grid, config.spatial_merge_size, config.window_side)
        patches = (units[:, None] * unit + np.arange(unit)).reshape(-1)
        return cls(patches, np.repeat(kept, unit), config.window_side**2 * unit, unit)

    def take(self, x: Float[Array, "b n d"]) -> Float[Array, "b m d"]:
        return x if self.patches is None else x[:, self.patches]

    def bias(self) -> Float[Array, "1 1 1 1 m"] | None:
        """Additive scores that keep empty slots out; None where there are none."""
        if self.kept is None or self.kept.all():
            return None
        return jnp.where(jnp.asarray(self.kept), 0.0, layers.MASKED).astype(jnp.float32)[None, None, None, None]

    def give_back(self, tokens: Float[Array, "b t o"]) -> Float[Array, "b u o"]:
        """Merged patches in reading order, without those of empty slots."""
        if self.patches is None:
            return tokens
        units, kept = self.patches[:: self.merge_unit] // self.merge_unit, self.kept[:: self.merge_unit]
        return tokens[:, np.nonzero(kept)[0][np.argsort(units[kept])]]


class PatchEmbed(nn.Module):
    """One dense layer on flattened patches, with a bias in Qwen3-VL."""

    config: VisionTowerConfig
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, patches: Float[Array, "b n p"]) -> Float[Array, "b n d"]:
        biased = self.config.family == "qwen3_vl"
        return nn.Dense(self.config.hidden_size, biased, self.dtype, param_dtype=self.param_dtype, name="proj")(patches)
