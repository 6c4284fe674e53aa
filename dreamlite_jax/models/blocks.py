"""Blocks of the DreamLite U-Net (oracle: diffusers `unet_dreamlite.py`, `transformer_2d_dreamlite.py`), NHWC.

Module names mirror the oracle's, so that `conversion.names` is one short table. Normalisations and softmax run in
float32 whatever `dtype` the matmuls use.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dreamlite_jax.types import Array, FeatureMap, Float, PerSample, TextMask, TextStates, Tokens

ENTRY_NORM_EPS = 1e-6  # GroupNorm at the entry of a spatial transformer; everywhere else it is 1e-5
TOKEN_NORM_EPS = 1e-5  # LayerNorm and q/k RMSNorm
MASK_BIAS = -10000.0  # additive score of a masked text token


def on_last_axis(parameter: Float[Array, "c"], x: Array) -> Array:
    """A parameter of the last axis with the rank of `x`: no rank is promoted silently."""
    return parameter.reshape((1,) * (x.ndim - 1) + parameter.shape)


class GroupNorm(nn.Module):
    """Group normalisation over (h, w, c/groups), written with four dimensions so that it exports as it is."""

    groups: int
    eps: float

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        b, h, w, c = x.shape
        scale = self.param("scale", nn.initializers.ones, (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        y = x.astype(jnp.float32).reshape(b, h * w, self.groups, c // self.groups)
        y = y - y.mean((1, 3), keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean((1, 3), keepdims=True) + self.eps)
        return (y.reshape(b, h, w, c) * on_last_axis(scale, x) + on_last_axis(bias, x)).astype(x.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis."""

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + TOKEN_NORM_EPS)
        return (y * on_last_axis(scale, x) + on_last_axis(bias, x)).astype(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis."""

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + TOKEN_NORM_EPS)
        return (y * on_last_axis(scale, x)).astype(x.dtype)


def conv(features: int, kernel: int, *, name: str, dtype, stride: int = 1, bias: bool = True, **options) -> nn.Conv:
    """2-D convolution with the torch padding of kernel // 2 on both sides ("SAME" differs when stride is 2)."""
    padding = ((kernel // 2, kernel // 2),) * 2
    return nn.Conv(
        features, (kernel, kernel), (stride, stride), padding=padding, use_bias=bias, dtype=dtype, name=name, **options
    )


def matmul(x: Float[Array, "... i"], kernel: Float[Array, "i o"]) -> Float[Array, "... o"]:
    """Product with the last axis, leading axes folded into rows: unfolded, its gradient is 4x slower on CPU."""
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


class Dense(nn.Module):
    """Linear layer over the last axis; kernel (in, out)."""

    features: int
    dtype: jnp.dtype
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        y = matmul(x.astype(self.dtype), kernel.astype(self.dtype))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + on_last_axis(bias.astype(self.dtype), y)
        return y


class PointwiseConv(nn.Module):
    """1x1 convolution, as the matrix product that it is; kernel (1, 1, in, out)."""

    features: int
    dtype: jnp.dtype
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: FeatureMap) -> Float[Array, "b h w o"]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (1, 1, x.shape[-1], self.features))
        y = matmul(x.astype(self.dtype), kernel[0, 0].astype(self.dtype))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + on_last_axis(bias.astype(self.dtype), y)
        return y


def depthwise_conv3x3(x: FeatureMap, kernel: Float[Array, "3 3 1 c"]) -> FeatureMap:
    """Depthwise 3x3 convolution, stride 1, padding 1, by the form that is fastest on the platform.

    XLA's grouped convolution on CPU is 7 to 20 times slower than a sum of nine shifted products.
    """
    return _shifted_conv3x3(x, kernel) if platform() == "cpu" else _grouped_conv3x3(x, kernel)


def platform() -> str:
    """Of the devices of the mesh in use (compiling ahead of time, those are elsewhere), else JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _grouped_conv3x3(x: FeatureMap, kernel: Float[Array, "3 3 1 c"]) -> FeatureMap:
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=layout, feature_group_count=x.shape[-1]
    )


def _shifts(x: Float[Array, "*b h w c"]) -> list[Float[Array, "*b h w c"]]:
    """`x` seen from each of the nine taps, row by row."""
    h, w = x.shape[-3:-1]
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(1, 1), (1, 1), (0, 0)])
    return [padded[..., i : i + h, j : j + w, :] for i in range(3) for j in range(3)]


@jax.custom_vjp
def _shifted_conv3x3(x: FeatureMap, kernel: Float[Array, "3 3 1 c"]) -> FeatureMap:
    taps = kernel.reshape(9, *(1,) * (x.ndim - 1), -1)
    return sum(view * tap for view, tap in zip(_shifts(x), taps, strict=True))


def _shifted_forward(x: FeatureMap, kernel: Array) -> tuple[FeatureMap, tuple[FeatureMap, Array]]:
    return _shifted_conv3x3(x, kernel), (x, kernel)


def _shifted_backward(residual: tuple[FeatureMap, Array], grad: FeatureMap) -> tuple[FeatureMap, Array]:
    """The kernel's gradient goes image by image: reducing (b, h, w) at once walks memory across channels, 6x slower."""
    x, kernel = residual

    def add_image(total: list[Array], pair: tuple[Array, Array]) -> tuple[list[Array], None]:
        image, image_grad = pair
        return [t + view * image_grad for t, view in zip(total, _shifts(image), strict=True)], None

    totals, _ = jax.lax.scan(add_image, [jnp.zeros(x.shape[1:], x.dtype)] * 9, (x, grad))
    kernel_grad = jnp.stack([total.sum((0, 1)) for total in totals]).reshape(kernel.shape)
    return _shifted_conv3x3(grad, kernel[::-1, ::-1]), kernel_grad


_shifted_conv3x3.defvjp(_shifted_forward, _shifted_backward)


def gelu(x: Float[Array, "..."], erf: Callable[[Array], Array] = jax.lax.erf) -> Float[Array, "..."]:
    """Exact GELU, x · Phi(x). Spelled with erf: jax.nn.gelu's erfc has a gradient three times as slow on CPU.

    `erf` is another spelling of it, for exports to what has none.
    """
    return 0.5 * x * (1.0 + erf(x * np.float32(math.sqrt(0.5)).astype(x.dtype)))


class DepthwiseConv(nn.Module):
    """`depthwise_conv3x3` with its kernel, stored as (3, 3, 1, c)."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=(0, 1), out_axis=3)
        kernel = self.param("kernel", init, (3, 3, 1, x.shape[-1]))
        return depthwise_conv3x3(x.astype(self.dtype), kernel.astype(self.dtype))


class SeparableConv(nn.Module):
    """Depthwise 3x3, then pointwise to `features`; no biases (oracle: `DepthwiseSeparableConv`)."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: FeatureMap) -> Float[Array, "b h w o"]:
        x = DepthwiseConv(self.dtype, name="depthwise")(x)
        return PointwiseConv(self.features, self.dtype, name="pointwise")(x)


class ResBlock(nn.Module):
    """GN → SiLU → conv → + time → GN → SiLU → conv, plus shortcut (oracle: `ResnetBlock2DDreamLite`).

    With separable convolutions the first widens to twice the channels, and the time projection with it.
    """

    features: int
    groups: int
    eps: float
    separable: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: FeatureMap, time: Float[Array, "b t"]) -> Float[Array, "b h w o"]:
        if self.separable:
            inner = 2 * self.features
            conv1 = SeparableConv(inner, self.dtype, name="conv1")
            conv2 = SeparableConv(self.features, self.dtype, name="conv2")
        else:
            inner = self.features
            conv1 = conv(inner, 3, dtype=self.dtype, name="conv1")
            conv2 = conv(self.features, 3, dtype=self.dtype, name="conv2")
        y = conv1(nn.silu(GroupNorm(self.groups, self.eps, name="norm1")(x)))
        y = y + Dense(inner, self.dtype, name="time_emb_proj")(nn.silu(time))[:, None, None, :]
        y = conv2(nn.silu(GroupNorm(self.groups, self.eps, name="norm2")(y)))
        if x.shape[-1] != self.features:
            x = PointwiseConv(self.features, self.dtype, use_bias=True, name="conv_shortcut")(x)
        return x + y


def attend(
    q: Float[Array, "b n k d"], k: Float[Array, "b m g d"], v: Float[Array, "b m g d"], bias: Float[Array, "b m"] | None
) -> Float[Array, "b n k*d"]:
    """Softmax attention with grouped keys; `bias` is added to every score of its key. Scores are float32 throughout.

    With one key head (the released model) query heads are folded into rows: two plain batched products that every
    delegate computes rightly, where a broadcast head axis is silently wrong on some.
    """
    b, n, heads, d = q.shape
    groups = k.shape[2]
    q = q * d**-0.5
    if groups == 1:
        rows = q.reshape(b, n * heads, d)
        scores = jnp.einsum("brd,bmd->brm", rows, k[:, :, 0], preferred_element_type=jnp.float32)
        if bias is not None:
            scores = scores + bias[:, None, :].astype(jnp.float32)
        weights = jax.nn.softmax(scores, -1).astype(v.dtype)
        return jnp.einsum("brm,bmd->brd", weights, v[:, :, 0]).reshape(b, n, heads * d)
    grouped = q.reshape(b, n, groups, heads // groups, d)
    scores = jnp.einsum("bngrd,bmgd->bgrnm", grouped, k, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + bias[:, None, None, None, :].astype(jnp.float32)
    weights = jax.nn.softmax(scores, -1).astype(v.dtype)
    return jnp.einsum("bgrnm,bmgd->bngrd", weights, v).reshape(b, n, heads * d)


class Attention(nn.Module):
    """Multi-query attention with RMS-normalised queries and keys (oracle: `DreamLiteAttnProcessor2_0`)."""

    heads: int
    kv_heads: int
    qk_norm: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Tokens, context: Float[Array, "b m d"], bias: Float[Array, "b m"] | None) -> Tokens:
        b, n, c = x.shape
        d = c // self.heads
        q = Dense(c, self.dtype, use_bias=False, name="to_q")(x).reshape(b, n, self.heads, d)
        k = Dense(self.kv_heads * d, self.dtype, use_bias=False, name="to_k")(context)
        v = Dense(self.kv_heads * d, self.dtype, use_bias=False, name="to_v")(context)
        k, v = (t.reshape(b, context.shape[1], self.kv_heads, d) for t in (k, v))
        if self.qk_norm:
            q, k = RMSNorm(name="norm_q")(q), RMSNorm(name="norm_k")(k)
        return Dense(c, self.dtype, name="to_out_0")(attend(q, k, v, bias))


class GEGLU(nn.Module):
    """Gated feed-forward input: first half value, second half through the exact (erf) GELU."""

    inner: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Tokens) -> Float[Array, "b n o"]:
        value, gate = jnp.split(Dense(2 * self.inner, self.dtype, name="proj")(x), 2, -1)
        return value * gelu(gate)


class FeedForward(nn.Module):
    mult: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        c = x.shape[-1]
        return Dense(c, self.dtype, name="net_2")(GEGLU(self.mult * c, self.dtype, name="net_0")(x))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward (oracle: `BasicTransformerBlockDreamLite`).

    Without self-attention the input is REPLACED by its LayerNorm: there is no residual around it.
    """

    heads: int
    kv_heads: int
    qk_norm: bool
    ff_mult: int
    self_attention: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Tokens, text: TextStates, bias: TextMask) -> Tokens:
        attention = (self.heads, self.kv_heads, self.qk_norm, self.dtype)
        y = LayerNorm(name="norm1")(x)
        x = x + Attention(*attention, name="attn1")(y, y, None) if self.self_attention else y
        x = x + Attention(*attention, name="attn2")(LayerNorm(name="norm2")(x), text, bias)
        return x + FeedForward(self.ff_mult, self.dtype, name="ff")(LayerNorm(name="norm3")(x))


class SpatialTransformer(nn.Module):
    """GroupNorm, linear in, transformer blocks, linear out, residual (oracle: `DreamLiteTransformer2DModel`)."""

    layers: int
    heads: int
    kv_heads: int
    qk_norm: bool
    ff_mult: int
    self_attention: bool
    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: FeatureMap, text: TextStates, bias: TextMask) -> FeatureMap:
        b, h, w, c = x.shape
        y = GroupNorm(self.groups, ENTRY_NORM_EPS, name="norm")(x).reshape(b, h * w, c)
        y = Dense(c, self.dtype, name="proj_in")(y)
        for i in range(self.layers):
            y = TransformerBlock(
                self.heads, self.kv_heads, self.qk_norm, self.ff_mult, self.self_attention, self.dtype,
                name=f"transformer_blocks_{i}",
            )(y, text, bias)  # fmt: skip
        return x + Dense(c, self.dtype, name="proj_out")(y).reshape(b, h, w, c)


class Resample(nn.Module):
    """Stride-2 3x3 convolution down, or nearest x2 then 3x3 up."""

    features: int
    up: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: FeatureMap) -> Float[Array, "b h2 w2 o"]:
        return conv(self.features, 3, stride=1 if self.up else 2, dtype=self.dtype, name="conv")(
            upsample_nearest(x) if self.up else x
        )


def upsample_nearest(x: FeatureMap) -> Float[Array, "b 2*h 2*w c"]:
    """Each pixel becomes a 2x2 block."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def sinusoid(x: PerSample, width: int) -> Float[Array, "b width"]:
    """[cos, sin] of x times geometric frequencies 1 … 1/10000 (exclusive), as in the oracle with flip and shift 0."""
    half = width // 2
    frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = x.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


class EmbeddingMLP(nn.Module):
    """Linear → SiLU → linear (oracle: `TimestepEmbedding`)."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b i"]) -> Float[Array, "b o"]:
        x = nn.silu(Dense(self.features, self.dtype, name="linear_1")(x))
        return Dense(self.features, self.dtype, name="linear_2")(x)
