"""The depthwise convolution as nine shifted products is XLA's grouped convolution, in value and in gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamlite_jax.models import blocks

SHAPES = [(2, 8, 12, 16), (1, 3, 5, 4), (3, 1, 7, 2), (1, 6, 1, 3)]
RELATIVE = 1e-5


def inputs(shape):
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.standard_normal(shape, np.float32)) for _ in range(2))
    return x, jnp.asarray(rng.standard_normal((3, 3, 1, shape[-1]), np.float32)), g


def value_and_gradients(function, x, kernel, grad):
    """The output, and the gradients of x and kernel when the output's gradient is `grad`."""
    out, pull = jax.vjp(function, x, kernel)
    return out, *pull(grad)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shifted_products_equal_the_grouped_convolution(shape):
    x, kernel, grad = inputs(shape)
    ours = value_and_gradients(blocks._shifted_conv3x3, x, kernel, grad)
    theirs = value_and_gradients(blocks._grouped_conv3x3, x, kernel, grad)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=RELATIVE * float(jnp.abs(b).max()), rtol=0)


@pytest.mark.parametrize("wrong", ["transposed", "flipped"])
def test_a_wrong_kernel_is_caught(wrong):
    x, kernel, grad = inputs(SHAPES[0])
    turned = kernel.swapaxes(0, 1) if wrong == "transposed" else kernel[::-1, ::-1]
    ours = value_and_gradients(blocks._shifted_conv3x3, x, turned, grad)
    theirs = value_and_gradients(blocks._grouped_conv3x3, x, kernel, grad)
    assert all(float(jnp.abs(a - b).max()) > 0.1 for a, b in zip(ours[:2], theirs[:2], strict=True))


def test_gradients_are_adjoint():
    """The operation is linear in each argument: <grad, f(dx, kernel)> = <gradient of x, dx>, and so for the kernel."""
    x, kernel, grad = inputs((2, 4, 3, 2))
    _, x_grad, kernel_grad = value_and_gradients(blocks._shifted_conv3x3, x, kernel, grad)
    for argument, gradient, change in (
        (0, x_grad, lambda dx: blocks._shifted_conv3x3(dx, kernel)),
        (1, kernel_grad, lambda dk: blocks._shifted_conv3x3(x, dk)),
    ):
        direction = jax.random.normal(jax.random.key(argument), gradient.shape)
        assert float(jnp.vdot(grad, change(direction))) == pytest.approx(float(jnp.vdot(gradient, direction)), rel=1e-4)


def test_it_computes_in_bfloat16_too():
    x, kernel, grad = (a.astype(jnp.bfloat16) for a in inputs(SHAPES[0]))
    ours = value_and_gradients(blocks._shifted_conv3x3, x, kernel, grad)
    exact = value_and_gradients(blocks._grouped_conv3x3, *(a.astype(jnp.float32) for a in (x, kernel, grad)))
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        assert float(jnp.abs(a.astype(jnp.float32) - b).max()) < 0.05 * float(jnp.abs(b).max())


def test_the_module_uses_it_with_its_stored_kernel():
    x, kernel, _ = inputs(SHAPES[0])
    module = blocks.DepthwiseConv(jnp.float32)
    out = module.apply({"params": {"kernel": kernel}}, x)
    np.testing.assert_allclose(out, blocks._grouped_conv3x3(x, kernel), atol=1e-5)
