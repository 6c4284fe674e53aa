"""Text tower of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, by config (oracle: transformers `Qwen3VLTextModel` and the like)."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from dreamlite_jax.models.qwen_vl import layers, rope
from dreamlite_jax.models.qwen_vl.config import TextTowerConfig
from dreamlite_jax.types import Array, Float, Int


class TextAttention(nn.Module):
    """Grouped-query self-attention; q and k are normalised a head where the config says so, then rotated."""

    config: TextTowerConfig
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b s d"],
        cos: Float[Array, "b s f"],
        sin: Float[Array, "b s f"],
        bias: Float[Array, "b 1 1 s s"],
    ) -> Float[Array, "b s d"]:
        config = self.config

        def heads(name: str, count: int) -> Array:
            dense = nn.Dense(
                count * config.head_dim, config.qkv_bias, self.dtype, param_dtype=self.param_dtype, name=name
            )
            return dense(x).reshape(*x.shape[:-1], count, config.head_dim)

        q = heads("q_proj", config.num_heads)
        k, v = heads("k_proj", config.num_kv_heads), heads("v_proj", config.num_kv_heads)
        if config.qk_norm:
            q = layers.RMSNorm(config.norm_eps, self.param_dtype, name="q_norm")(q)
            k = layers.RMSNorm(config.norm_eps, self.param_dtype, name="k_norm")(k)
        out = layers.attention(rope.rotate(q, cos, sin), rope.rotate(k, cos, sin), v, bias)
        out = out.reshape(*x.shape[:-1], config.num_heads * config.head_dim)
        return nn.Dense(config.hidden_size, False, self.dtype, param_dtype=self.param_dtype, name="o_proj")(out)


class TextLayer(nn.Module):
    """Pre-norm decoder layer."""

    config: TextTowerConfig
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, cos: Array, sin: Array, bias: Array) -> Array:
        config, dtypes = self.config, (self.dtype, self.param_dtype)
        y = layers.RMSNorm(config.norm_eps, self.param_dtype, name="input_layernorm")(x)
        x = x + TextAttention(config, *dtypes, name="self_attn")(y, cos, sin, bias)
        y = layers.RMSNorm(config.norm_eps, self.param_dtype, name="post_attention_layernorm")(x)
        return x + layers.GatedMLP(config.intermediate_size, False, *dtypes, name="mlp")(y)


class TextTower(nn.Module):
    """Token embeddings and decoder layers; the result is the last layer's output, through the final norm if
    `config.final_norm`.

    `hidden_states[-1]` of a whole Qwen3-VL of transformers is the state before the norm in 4.57 and the one after it in
    5. Attributes as in `QwenVL`. Layer parameters are stacked on a first axis under `layers`.
    """

    config: TextTowerConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    remat: bool = False
    sharding: jax.sharding.NamedSharding | None = None

    def setup(self):
        config = self.config
        self.embed_tokens = nn.Embed(
            config.vocab_size, config.hidden_size, dtype=self.dtype, param_dtype=self.param_dtype
        )
        self.layers = self.param("layers", layers.init_stack, self.layer, config.num_layers, *self._layer_inputs())
        self.norm = layers.RMSNorm(config.norm_eps, self.param_dtype) if config.final_norm else None

    @property
    def layer(self) -> TextLayer:
        return TextLayer(self.config, self.dtype, self.param_dtype, parent=None)

    def _layer_inputs(self) -> tuple[Array, ...]:
        """One-token inputs of a layer, for `init`."""
        angles = jnp.zeros((1, 1, self.config.head_dim // 2))
        return jnp.zeros((1, 1, self.config.hidden_size), self.dtype), angles, angles, jnp.zeros((1, 1, 1, 1, 1))

    def embed(self, ids: Int[Array, "b s"]) -> Float[Array, "b s d"]:
        """Token embeddings."""
        return self.embed_tokens(ids)

    def __call__(
        self,
        x: Float[Array, "b s d"],
        positions: Int[Array, "3 b s"],
        mask: Array,
        deepstack: Float[Array, "n b s d"] | None = None,
    ) -> Float[Array, "b s d"]:
        """States of embeddings `x` after all layers.

        Args:
          positions: time, row and column of each token (`rope.text_positions`, `rope.multimodal_positions`).
          mask: (b, s), above 0 = keep; states at masked tokens are finite and mean nothing.
          deepstack: visual features added to the output of the first n layers, 0 away from image tokens.
        """
        config = self.config
        cos, sin = rope.mrope(
            positions, config.head_dim, config.rope_theta, config.mrope_section, config.mrope_interleaved
        )
        inputs = (cos, sin, causal_bias(mask))
        run = {"remat": self.remat, "sharding": self.sharding}
        first = 0 if deepstack is None else deepstack.shape[0]
        if first:
            x = layers.run_stack(self.layer, self.layers, x, *inputs, blocks=(0, first), added=deepstack, **run)
        x = layers.run_stack(self.layer, self.layers, x, *inputs, blocks=(first, config.num_layers), **run)
        return x if self.norm is None else self.norm(x)


def causal_bias(mask: Array) -> Float[Array, "b 1 1 s s"]:
    """Additive scores: 0 where the key is kept and not after the query, else `layers.MASKED`."""
    tokens = mask.shape[-1]
    allowed = jnp.tril(jnp.ones((tokens, tokens), bool))[None] & (mask > 0)[:, None, :]
    return jnp.where(allowed, 0.0, layers.MASKED).astype(jnp.float32)[:, None, None]
