"""The export form of the U-Net: the same walk as `dreamlite_jax.models.unet`, over weights in LiteRT's layouts.

What a phone computes better outside stays outside: the sinusoids of timestep and size (sin and cos of 1000 lose all
digits in half precision) and the additive bias of masked text tokens.
"""

import jax.numpy as jnp

from dreamlite_jax.config import BlockKind, UNetConfig
from dreamlite_jax.models import blocks

from .graph_ops import (
    Array,
    Node,
    attend,
    conv,
    dense,
    gelu,
    group_norm,
    layer_norm,
    rms_norm,
    scoped,
    separable_conv,
    silu,
    upsample_nearest,
)


def unet(
    node: Node,
    config: UNetConfig,
    sample: Array,
    time_features: Array,
    size_features: Array,
    text: Array,
    text_bias: Array,
    *,
    attention_chunk: int = 0,
) -> Array:
    """Velocity (b, h, 2w, c) of the canvas `sample` (b, h, 2w, c).

    Args:
      time_features: (b, block_out_channels[0]), `blocks.sinusoid` of the timestep 1000 · sigma.
      size_features: (b, 2 · size_embed_dim), sinusoids of one panel's width and height in pixels, one after the other.
      text: (b, s, text_dim) encoder states.
      text_bias: (b, s), 0 for a token and -10000 for padding.
    """
    time = silu(_mlp(node.sub("time_embedding"), time_features) + _mlp(node.sub("add_embedding"), size_features))
    text = _text_projection(node.sub("encoder_hid_proj"), text)
    walk = _Walk(config, time, text, text_bias, attention_chunk)
    x = conv(node.sub("conv_in"), sample)
    skips = [x]
    for level, kind in enumerate(config.down_blocks):
        x = _down(node.sub(f"down_blocks_{level}"), walk, level, kind, x, skips)
    x = _mid(node.sub("mid_block"), walk, x)
    for i, kind in enumerate(config.up_blocks):
        x = _up(node.sub(f"up_blocks_{i}"), walk, config.levels - 1 - i, kind, x, skips)
    x = silu(group_norm(node.sub("conv_norm_out"), x, config.norm_groups, config.norm_eps))
    return conv(node.sub("conv_out"), x)


class _Walk:
    """What every block needs besides its own weights."""

    def __init__(self, config: UNetConfig, time: Array, text: Array, text_bias: Array, attention_chunk: int):
        self.config = config
        self.time = time  # already through SiLU, as each block's projection wants it
        self.text = text
        self.text_bias = text_bias
        self.attention_chunk = attention_chunk


@scoped
def _mlp(node: Node, x: Array) -> Array:
    return dense(node.sub("linear_2"), silu(dense(node.sub("linear_1"), x)))


@scoped
def _text_projection(node: Node, text: Array) -> Array:
    return rms_norm(node.sub("proj_1"), dense(node.sub("proj_0"), text))


@scoped
def _down(node: Node, walk: _Walk, level: int, kind: BlockKind, x: Array, skips: list[Array]) -> Array:
    for i in range(walk.config.layers_per_block):
        x = _res(node.sub(f"resnets_{i}"), walk, x)
        x = _transformer(node, i, walk, level, kind, x)
        skips.append(x)
    if level < walk.config.levels - 1:
        x = _resample(node.sub("downsamplers_0"), x, stride=2)
        skips.append(x)
    return x


@scoped
def _mid(node: Node, walk: _Walk, x: Array) -> Array:
    x = _res(node.sub("resnets_0"), walk, x)
    for i in range(walk.config.mid_layers):
        x = _transformer(node, i, walk, walk.config.levels - 1, "self_cross", x)
        x = _res(node.sub(f"resnets_{i + 1}"), walk, x)
    return x


@scoped
def _up(node: Node, walk: _Walk, level: int, kind: BlockKind, x: Array, skips: list[Array]) -> Array:
    for i in range(walk.config.layers_per_block + 1):
        x = _res(node.sub(f"resnets_{i}"), walk, jnp.concatenate([x, skips.pop()], -1))
        x = _transformer(node, i, walk, level, kind, x)
    return _resample(node.sub("upsamplers_0"), upsample_nearest(x)) if level > 0 else x


@scoped
def _resample(node: Node, x: Array, stride: int = 1) -> Array:
    return conv(node.sub("conv"), x, stride)


@scoped
def _res(node: Node, walk: _Walk, x: Array) -> Array:
    config = walk.config
    block_conv = separable_conv if config.separable_convs else conv
    y = silu(group_norm(node.sub("norm1"), x, config.norm_groups, config.norm_eps))
    y = block_conv(node.sub("conv1"), y)
    y = y + dense(node.sub("time_emb_proj"), walk.time)[:, None, None, :]
    y = silu(group_norm(node.sub("norm2"), y, config.norm_groups, config.norm_eps))
    y = block_conv(node.sub("conv2"), y)
    return (conv(node.sub("conv_shortcut"), x) if "conv_shortcut" in node else x) + y


def _transformer(parent: Node, i: int, walk: _Walk, level: int, kind: BlockKind, x: Array) -> Array:
    if kind == "plain":
        return x
    return _spatial_transformer(parent.sub(f"attentions_{i}"), walk, level, kind == "self_cross", x)


@scoped
def _spatial_transformer(node: Node, walk: _Walk, level: int, self_attention: bool, x: Array) -> Array:
    b, h, w, c = x.shape
    y = group_norm(node.sub("norm"), x, walk.config.norm_groups, blocks.ENTRY_NORM_EPS)
    y = dense(node.sub("proj_in"), y.reshape(b, h * w, c))
    for i in range(walk.config.transformer_layers[level]):
        y = _transformer_block(node.sub(f"transformer_blocks_{i}"), walk, level, self_attention, y)
    return x + dense(node.sub("proj_out"), y).reshape(b, h, w, c)


@scoped
def _transformer_block(node: Node, walk: _Walk, level: int, self_attention: bool, x: Array) -> Array:
    """Without self-attention the input is replaced by its norm: there is no residual around it."""
    y = layer_norm(node.sub("norm1"), x)
    x = x + _attention(node.sub("attn1"), walk, level, y, y, None) if self_attention else y
    y = layer_norm(node.sub("norm2"), x)
    x = x + _attention(node.sub("attn2"), walk, level, y, walk.text, walk.text_bias)
    return x + _feed_forward(node.sub("ff"), layer_norm(node.sub("norm3"), x))


@scoped
def _feed_forward(node: Node, x: Array) -> Array:
    return dense(node.sub("net_2"), _geglu(node.sub("net_0"), x))


@scoped
def _geglu(node: Node, x: Array) -> Array:
    return dense(node.sub("value"), x) * gelu(dense(node.sub("gate"), x))


@scoped
def _attention(node: Node, walk: _Walk, level: int, x: Array, context: Array, bias: Array | None) -> Array:
    """Query heads that share a key head are folded into rows, so that every product has equal batch axes.

    A broadcast key axis instead is right on CPU and silently wrong on LiteRT's GPU accelerator.
    """
    config = walk.config
    heads = config.num_heads[level]
    groups = config.num_kv_heads or heads
    b, n, c = x.shape
    m, d = context.shape[1], c // heads
    q, k, v = dense(node.sub("to_q"), x), dense(node.sub("to_k"), context), dense(node.sub("to_v"), context)
    if groups == 1:
        q = q.reshape(b, n * heads, d)
        bias = None if bias is None else bias.reshape(b, 1, m)
    else:
        q = q.reshape(b, n, groups, c // groups).transpose(0, 2, 1, 3).reshape(b, groups, n * heads // groups, d)
        k, v = (t.reshape(b, m, groups, d).transpose(0, 2, 1, 3) for t in (k, v))
        bias = None if bias is None else bias.reshape(b, 1, 1, m)
    if config.qk_norm:
        q, k = rms_norm(node.sub("norm_q"), q), rms_norm(node.sub("norm_k"), k)
    y = attend(q, k, v, bias, walk.attention_chunk)
    if groups > 1:
        y = y.reshape(b, groups, n, c // groups).transpose(0, 2, 1, 3)
    return dense(node.sub("to_out_0"), y.reshape(b, n, c))
