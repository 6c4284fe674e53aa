"""Layers as other frameworks define them by default: negative controls of the parity tests."""

import jax
from flax import linen as nn


def same_padding_conv(features, kernel, *, name, dtype, stride=1, bias=True, **options):
    strides = (stride, stride)
    return nn.Conv(
        features, (kernel, kernel), strides, padding="SAME", use_bias=bias, dtype=dtype, name=name, **options
    )


def bilinear(x):
    b, h, w, c = x.shape
    return jax.image.resize(x, (b, 2 * h, 2 * w, c), "bilinear")
