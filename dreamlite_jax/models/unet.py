"""The DreamLite U-Net (paper section 3.1; oracle: diffusers `DreamLiteUNetModel`), NHWC."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from dreamlite_jax.config import BlockKind, UNetConfig
from dreamlite_jax.models import blocks
from dreamlite_jax.types import Array, FeatureMap, Float, PerSample, TextMask, TextStates, TimeIds


class TextProjection(nn.Module):
    """Text states to the width of cross-attention: linear, then RMSNorm (oracle: `encoder_hid_proj`, text_proj_rms)."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, text: TextStates) -> Float[Array, "b s o"]:
        return blocks.RMSNorm(name="proj_1")(blocks.Dense(self.features, self.dtype, name="proj_0")(text))


class Stage(nn.Module):
    """One level: res blocks, each followed by the transformer that the level's kind asks for.

    As in the oracle, the middle has one res block before its first transformer and one after each.
    """

    config: UNetConfig
    level: int
    kind: BlockKind
    role: str  # down | mid | up
    dtype: jnp.dtype
    sharding: jax.sharding.NamedSharding | None = None

    @nn.compact
    def __call__(
        self, x: FeatureMap, time: Float[Array, "b t"], text: TextStates, bias: TextMask, skips: list[Array]
    ) -> tuple[Float[Array, "b h2 w2 o"], list[Array]]:
        config, features = self.config, self.config.block_out_channels[self.level]
        res_count = {"down": config.layers_per_block, "mid": config.mid_layers, "up": config.layers_per_block + 1}[
            self.role
        ]

        def res(i: int, x: FeatureMap) -> Float[Array, "b h w o"]:
            block = blocks.ResBlock(
                features, config.norm_groups, config.norm_eps, config.separable_convs, self.dtype, name=f"resnets_{i}"
            )
            return pin(block(x, time), self.sharding)

        def transformer(i: int, x: FeatureMap) -> FeatureMap:
            if self.kind == "plain":
                return x
            heads = config.num_heads[self.level]
            block = blocks.SpatialTransformer(
                config.transformer_layers[self.level], heads, config.num_kv_heads or heads, config.qk_norm,
                config.ff_mult, self.kind == "self_cross", config.norm_groups, self.dtype, name=f"attentions_{i}",
            )  # fmt: skip
            return pin(block(x, text, bias), self.sharding)

        if self.role == "mid":
            x = res(0, x)
            for i in range(res_count):
                x = res(i + 1, transformer(i, x))
            return x, skips
        last = self.level == (config.levels - 1 if self.role == "down" else 0)
        skips = list(skips)
        for i in range(res_count):
            if self.role == "up":
                x = jnp.concatenate([x, skips.pop()], -1)
            x = transformer(i, res(i, x))
            if self.role == "down":
                skips.append(x)
        if not last:
            name = "upsamplers_0" if self.role == "up" else "downsamplers_0"
            x = pin(blocks.Resample(features, self.role == "up", self.dtype, name=name)(x), self.sharding)
            if self.role == "down":
                skips.append(x)
        return x, skips


class UNet(nn.Module):
    """Velocity of a canvas of panels.

    Attributes:
      config: architecture.
      dtype: of matmuls and activations; parameters, norms and the output are float32.
      remat: recompute each stage in the backward pass instead of keeping its activations.
      sharding: pins every stage's activations to this sharding of the batch (a mesh of several devices needs it,
        see design: unpinned, the partitioner inserts collectives on activations).
      remat_keep: what a recomputed stage keeps all the same: "nothing", or the results of its "matmuls".
    """

    config: UNetConfig
    dtype: jnp.dtype = jnp.float32
    remat: bool = False
    sharding: jax.sharding.NamedSharding | None = None
    remat_keep: str = "nothing"

    @nn.compact
    def __call__(
        self,
        sample: Float[Array, "b h w2 c"],
        timestep: PerSample,
        text: TextStates,
        mask: TextMask,
        time_ids: TimeIds,
    ) -> Float[Array, "b h w2 o"]:
        """Velocity of `sample` at `timestep` (1000 · sigma, so 0..1000).

        Args:
          text, mask: encoder states and 1 = keep; a masked token gets an additive score of -10000.
          time_ids: (width, height) of ONE panel in pixels.
        """
        config = self.config
        time = self.time_features(timestep, time_ids)
        bias = (1.0 - mask.astype(jnp.float32)) * blocks.MASK_BIAS
        text = TextProjection(config.cross_attention_dim, self.dtype, name="encoder_hid_proj")(text.astype(self.dtype))
        time, text = pin(time, self.sharding), pin(text, self.sharding)

        keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if self.remat_keep == "matmuls" else None
        stage = nn.remat(Stage, policy=keep) if self.remat else Stage
        x = blocks.conv(config.block_out_channels[0], 3, dtype=self.dtype, name="conv_in")(sample.astype(self.dtype))
        x = pin(x, self.sharding)
        skips = [x]
        for i, kind in enumerate(config.down_blocks):
            x, skips = stage(config, i, kind, "down", self.dtype, self.sharding, name=f"down_blocks_{i}")(
                x, time, text, bias, skips
            )
        x, skips = stage(config, config.levels - 1, "self_cross", "mid", self.dtype, self.sharding, name="mid_block")(
            x, time, text, bias, skips
        )
        for i, kind in enumerate(config.up_blocks):
            level = config.levels - 1 - i
            x, skips = stage(config, level, kind, "up", self.dtype, self.sharding, name=f"up_blocks_{i}")(
                x, time, text, bias, skips
            )
        x = nn.silu(blocks.GroupNorm(config.norm_groups, config.norm_eps, name="conv_norm_out")(x))
        # In float32: the last product decides the precision of the velocity and costs next to nothing.
        return blocks.conv(config.out_channels, 3, dtype=jnp.float32, name="conv_out")(x)

    def time_features(self, timestep: PerSample, time_ids: TimeIds) -> Float[Array, "b t"]:
        """Sum of the timestep's and the panel size's embeddings, each through its MLP."""
        config = self.config
        width = 4 * config.block_out_channels[0]
        time = blocks.sinusoid(timestep, config.block_out_channels[0]).astype(self.dtype)
        size = blocks.sinusoid(time_ids.reshape(-1), config.size_embed_dim).astype(self.dtype)
        time = blocks.EmbeddingMLP(width, self.dtype, name="time_embedding")(time)
        size = size.reshape(time_ids.shape[0], 2 * config.size_embed_dim)
        return time + blocks.EmbeddingMLP(width, self.dtype, name="add_embedding")(size)


def pin(x: Array, sharding: jax.sharding.NamedSharding | None) -> Array:
    """`x` constrained to `sharding` (of its leading axis), or as it is without one."""
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)


def dummy_inputs(config: UNetConfig, height: int = 0, width: int = 0, text_length: int = 8, batch: int = 1) -> tuple:
    """Zero inputs of a valid shape, for `init` and `eval_shape`; height and width are one panel's latent size."""
    height, width = height or config.size_multiple, width or config.size_multiple
    columns = 2 * width if config.condition_layout == "width" else width
    return (
        jnp.zeros((batch, height, columns, config.in_channels), jnp.float32),
        jnp.zeros((batch,), jnp.float32),
        jnp.zeros((batch, text_length, config.text_dim), jnp.float32),
        jnp.ones((batch, text_length), jnp.float32),
        jnp.zeros((batch, 2), jnp.float32),
    )
