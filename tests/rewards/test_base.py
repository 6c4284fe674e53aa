"""Sums of rewards: weights, tasks, parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamlite_jax.errors import UserError
from dreamlite_jax.rewards.base import Context, RewardSum, Term


class Brightness:
    """Mean pixel times a parameter, plus the length of the prompt."""

    def __init__(self, gain: float):
        self.params = {"gain": jnp.float32(gain)}

    def prepare(self, prompts):
        return {"length": np.array([len(prompt) for prompt in prompts], np.float32)}

    def __call__(self, params, images, context):
        return params["gain"] * images.mean((1, 2, 3)) + context.tokens["length"]


def context(reward, prompts, editing):
    pictures = np.zeros((len(prompts), 2, 2, 3), np.float32)
    return Context(reward.prepare(prompts), pictures, pictures, np.asarray(editing, np.float32))


def test_weights_and_tasks():
    reward = RewardSum([Term("all", Brightness(1.0), 2.0), Term("edits", Brightness(10.0), 0.5, ("edit",))])
    images = np.full((2, 2, 2, 3), 3.0, np.float32)
    about = context(reward, ["ab", "c"], [0, 1])
    np.testing.assert_array_equal(jax.jit(reward)(reward.params, images, about), [2 * 5, 2 * 4 + 0.5 * 31])
    parts = reward.parts(reward.params, images, about)
    assert list(parts) == ["all", "edits"]
    np.testing.assert_array_equal(parts["all"].score, [5, 4])
    np.testing.assert_array_equal(parts["edits"].score, [0, 31])
    np.testing.assert_array_equal(parts["edits"].applies, [0, 1])


def test_gradients_stop_where_a_reward_does_not_apply():
    reward = RewardSum([Term("edits", Brightness(12.0), 1.0, ("edit",))])
    about = context(reward, ["ab", "c"], [0, 1])
    gradient = jax.grad(lambda images: reward(reward.params, images, about).sum())(jnp.zeros((2, 2, 2, 3)))
    np.testing.assert_array_equal(gradient[0], 0)
    np.testing.assert_allclose(gradient[1], 1.0)


def test_parameters_are_an_argument():
    """A compiled sum follows the parameters that it is given, not those it was made with."""
    reward = RewardSum([Term("only", Brightness(1.0))])
    images, about = np.ones((1, 2, 2, 3), np.float32), context(reward, [""], [0])
    score = jax.jit(reward)
    assert float(score(reward.params, images, about)[0]) == 1.0
    assert float(score({"only": {"gain": jnp.float32(7.0)}}, images, about)[0]) == 7.0


BAD_SUMS = {
    "rewards is empty": [],
    "each needs its own": [Term("a", Brightness(1.0)), Term("a", Brightness(1.0))],
    "reward a: tasks is empty": [Term("a", Brightness(1.0), 1.0, ())],
    "reward a: weight is nan": [Term("a", Brightness(1.0), float("nan"))],
}


@pytest.mark.parametrize("message", BAD_SUMS)
def test_bad_sums(message):
    with pytest.raises(UserError, match=message):
        RewardSum(BAD_SUMS[message])
