"""Guidance against its formulas, written out as in the released pipeline, and their identities."""

import jax.numpy as jnp
import numpy as np
import pytest

from dreamlite_jax.diffusion import guidance
from dreamlite_jax.diffusion.guidance import Branch


@pytest.fixture(scope="module")
def velocities():
    """(3, 2, 3, 4, 5): null, image, text."""
    return jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 3, 4, 5)), jnp.float32)


def test_the_formulas(velocities):
    uncond, image, text = np.asarray(velocities)
    single = guidance.combine(velocities[::2], 3.5, 9.0)
    np.testing.assert_allclose(single, uncond + 3.5 * (text - uncond), rtol=1e-6, atol=1e-6)
    dual = guidance.combine(velocities, 3.5, 1.5)
    np.testing.assert_allclose(dual, uncond + 3.5 * (text - image) + 1.5 * (image - uncond), rtol=1e-5, atol=1e-5)
    assert np.abs(dual - guidance.combine(velocities, 1.5, 3.5)).max() > 0.1  # the scales are not exchangeable


def test_scale_one_is_the_prompted_velocity(velocities):
    text = velocities[-1]
    assert np.array_equal(guidance.combine(velocities[-1:], 7.0, 7.0), text)
    np.testing.assert_allclose(guidance.combine(velocities[::2], 1.0, 7.0), text, atol=1e-6)
    np.testing.assert_allclose(guidance.combine(velocities, 1.0, 1.0), text, atol=1e-6)


@pytest.mark.parametrize("editing", [False, True])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (1.0, 1.5), (0.5, 1.0), (3.5, 1.0)])
def test_there_is_guidance_where_the_other_branches_matter(velocities, editing, scales):
    seen = velocities if editing else velocities[::2]
    matters = np.abs(guidance.combine(seen, *scales) - velocities[-1]).max() > 1e-5
    assert guidance.is_guided(editing, *scales) == matters


def test_scale_zero_leaves_the_text_out(velocities):
    null, image, _ = velocities
    np.testing.assert_allclose(guidance.combine(velocities[::2], 0.0, 7.0), null, atol=1e-6)
    np.testing.assert_allclose(guidance.combine(velocities, 0.0, 1.0), image, atol=1e-6)


def test_the_branches_are_in_the_order_of_the_formula():
    null, image, text = Branch(False, False), Branch(False, True), Branch(True, True)
    assert guidance.branches(editing=True, guided=True) == (null, image, text)
    assert guidance.branches(editing=False, guided=True) == (null, text)
    assert guidance.branches(editing=True, guided=False) == guidance.branches(editing=False, guided=False) == (text,)


def test_four_branches_mean_nothing(velocities):
    with pytest.raises(ValueError, match="4 branches"):
        guidance.combine(jnp.concatenate([velocities, velocities[:1]]), 3.5, 1.5)
