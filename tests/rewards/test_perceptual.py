"""Nearness to the true picture: the formula, what it prefers, and that climbing it works."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamlite_jax.assets import vae_path
from dreamlite_jax.data.sprites import builder
from dreamlite_jax.data.sprites.render import render
from dreamlite_jax.data.sprites.scenes import neighbours
from dreamlite_jax.errors import UserError
from dreamlite_jax.pictures import to_float
from dreamlite_jax.rewards.base import Context
from dreamlite_jax.rewards.config import RewardConfig
from dreamlite_jax.rewards.load import load_rewards
from dreamlite_jax.rewards.perceptual import TargetReward, perceptual_distance

ITEMS = 16


@pytest.fixture(scope="module")
def reward():
    return TargetReward.from_vae(vae_path(""))


@pytest.fixture(scope="module")
def scenes():
    """True pictures (n, 64, 64, 3), and of each one that differs in one object, colour or place."""
    items = list(builder.samples("t2i", "validation", ITEMS))
    rng = np.random.default_rng(0)
    near = [render(neighbours(item.target, rng, 1)[0], 64) for item in items]
    return to_float(np.stack([render(item.target, 64) for item in items])), to_float(np.stack(near))


@pytest.fixture(scope="module")
def scores(reward):
    """(images, targets) -> (b,), compiled once."""

    @jax.jit
    def run(params, images, target):
        return reward(params, images, Context({}, target, target, jnp.zeros(len(images))))

    return lambda images, target: np.asarray(run(reward.params, images, target))


def blurred(images: np.ndarray, radius: int) -> np.ndarray:
    """Box blur; edges repeat."""
    padded = np.pad(images, ((0, 0), (radius, radius), (radius, radius), (0, 0)), "edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * radius + 1,) * 2, (1, 2))
    return windows.mean((-2, -1)).astype(np.float32)


def test_the_formula_of_lpips():
    rng = np.random.default_rng(0)
    first = [rng.standard_normal((2, 4, 4, 3)).astype(np.float32), rng.standard_normal((2, 2, 2, 5)).astype(np.float32)]
    second = [rng.standard_normal(x.shape).astype(np.float32) for x in first]
    weights = [rng.uniform(size=x.shape[-1]).astype(np.float32) for x in first]
    expected = np.zeros(2)
    for a, b, w in zip(first, second, weights, strict=True):
        a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
        expected += ((a - b) ** 2 @ w).mean((1, 2))
    np.testing.assert_allclose(perceptual_distance(first, second, weights), expected, rtol=1e-5)
    assert np.abs(perceptual_distance(first, second) - expected).min() > 0.1
    np.testing.assert_allclose(perceptual_distance([3.0 * x for x in first], first, weights), 0, atol=1e-6)


def test_features_of_every_level(reward):
    shapes = [x.shape for x in jax.eval_shape(reward.features, reward.params, jnp.zeros((2, 64, 64, 3)))]
    assert shapes == [(2, 64, 64, 32), (2, 32, 32, 32), (2, 16, 16, 32), (2, 8, 8, 32)]


def test_the_true_picture_is_best(scores, scenes):
    truth, near = scenes
    np.testing.assert_allclose(scores(truth, truth), 0, atol=1e-6)
    wrong, blur, other = scores(near, truth), scores(blurred(truth, 2), truth), scores(np.roll(truth, 1, 0), truth)
    assert wrong.max() < -0.05 and 0.5 < -wrong.mean() < 2.0
    assert blur.max() < -0.1
    assert (other < wrong).mean() > 0.8


def test_the_blur_of_two_guesses_wins_nothing(scores, scenes):
    """Squared error would pay half of a wrong guess's price for the mean of both; lengths pay it whole."""
    truth, near = scenes
    guess = scores(near, truth).mean() / 2  # right half of the time
    mean = (truth + near) / 2
    blend = (scores(mean, truth).mean() + scores(mean, near).mean()) / 2
    assert blend < 0.95 * guess
    squares = np.square(mean - truth).mean() / (np.square(near - truth).mean() / 2)
    assert squares == pytest.approx(0.5, abs=1e-3)


@pytest.mark.slow
def test_climbing_the_reward_finds_the_scene(reward, scores, scenes):
    """From its neighbour, by gradients alone, a picture becomes the true one in pixels too."""
    truth, near = scenes[0][:2], scenes[1][:2]

    @functools.partial(jax.jit, static_argnums=2)
    def climb(params, images, steps):
        slope = jax.grad(lambda x: reward(params, x, Context({}, truth, truth, jnp.zeros(2))).sum())

        def step(i, images):
            return images + 0.1 * (1 - i.astype(jnp.float32) / steps) * jnp.sign(slope(images))

        return jax.lax.fori_loop(0, steps, step, images)

    found = np.asarray(climb(reward.params, jnp.asarray(near), 60))
    before, after = (np.square(x - truth).mean() for x in (near, found))
    assert after < 0.05 * before
    assert scores(np.tile(found, (8, 1, 1, 1)), np.tile(truth, (8, 1, 1, 1))).min() > -0.2


def test_gradients_are_finite_where_pictures_agree(reward, scenes):
    truth = scenes[0][:2]
    about = Context({}, truth, truth, jnp.zeros(2))
    slope = jax.jit(jax.grad(lambda params, x: reward(params, x, about).sum(), 1))
    for images in (truth, np.zeros_like(truth)):
        assert np.isfinite(slope(reward.params, images)).all()


def test_weights_of_the_parts(reward, scenes):
    truth, near = scenes[0][:2], scenes[1][:2]
    parts = jax.jit(reward.distances)(reward.params, near, truth)
    about = Context({}, truth, truth, jnp.zeros(2))
    heavy = TargetReward(reward.features, reward.params, perceptual_weight=2.0, pixel_weight=3.0)
    expected = -(2.0 * parts["perceptual"] + 3.0 * parts["pixel"])
    np.testing.assert_allclose(jax.jit(heavy)(heavy.params, near, about), expected, rtol=1e-5)
    np.testing.assert_allclose(parts["pixel"], np.abs(near - truth).mean((1, 2, 3)) / 2, atol=2e-3)
    with pytest.raises(UserError, match="pixel_weight is -1"):
        TargetReward.from_vae(vae_path(""), pixel_weight=-1.0)


def test_from_a_config(scenes):
    both = load_rewards([RewardConfig("target"), RewardConfig("target", weight=0.5, tasks=("edit",))])
    assert [term.name for term in both.terms] == ["target_0", "target_1"]
    truth, near = scenes[0][:2], scenes[1][:2]
    about = Context(both.prepare(["a", "b"]), truth, truth, np.array([0, 1], np.float32))
    single = load_rewards([RewardConfig("target")])
    score = single.parts(single.params, near, about.replace(tokens={"target": {}}))["target"].score
    np.testing.assert_allclose(both(both.params, near, about), score * np.array([1.0, 1.5], np.float32), rtol=1e-5)
