"""Left and right: the canvas is [noisy target | condition], and only its left half counts."""

import jax.numpy as jnp
import numpy as np
import pytest

from dreamlite_jax.diffusion import panels

LAYOUTS = {"width": (2, 3, 10, 4), "channel": (2, 3, 5, 8)}


@pytest.fixture(scope="module")
def pair():
    """(target, condition), (2, 3, 5, 4) each."""
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(2, 3, 5, 4)), jnp.float32) for _ in range(2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_canvas_is_the_target_then_the_condition(pair, layout):
    target, condition = pair
    canvas = panels.compose(target, condition, layout)
    assert canvas.shape == LAYOUTS[layout]
    left, right = np.split(canvas, 2, axis={"width": 2, "channel": 3}[layout])
    assert np.array_equal(left, target) and np.array_equal(right, condition)
    assert not np.array_equal(panels.compose(condition, target, layout), canvas)  # the order matters


def test_the_target_is_on_the_left(pair):
    target, condition = pair
    canvas = panels.compose(target, condition)
    assert np.array_equal(canvas[:, :, :5], target)
    assert np.array_equal(panels.target_half(canvas), target)
    assert not np.array_equal(panels.target_half(panels.compose(condition, target)), target)


def test_stacked_panels_predict_the_target_alone(pair):
    target, _ = pair
    assert np.array_equal(panels.target_half(target, "channel"), target)


def test_a_blank_condition_is_zero_latents(pair):
    blank = panels.blank_like(pair[0])
    assert blank.shape == pair[0].shape and not blank.any()
