"""The path, its schedule and its integration, held against mathematics and the numbers of the spec (section 5)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamlite_jax.config import SchedulerConfig
from dreamlite_jax.diffusion import flow
from dreamlite_jax.errors import UserError


@pytest.fixture(scope="module")
def ends():
    """(data, noise), (3, 2, 4, 5) each."""
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(3, 2, 4, 5)), jnp.float32) for _ in range(2))


def test_the_path_goes_from_data_to_noise(ends):
    data, noise = ends
    assert np.array_equal(flow.interpolate(data, noise, jnp.zeros(3)), data)
    assert np.array_equal(flow.interpolate(data, noise, jnp.ones(3)), noise)
    mixed = flow.interpolate(data, noise, jnp.asarray([0.0, 0.25, 1.0]))  # every item has its own sigma
    np.testing.assert_allclose(mixed[1], 0.75 * data[1] + 0.25 * noise[1], rtol=1e-6)
    assert np.array_equal(mixed[2], noise[2])


def test_the_target_is_the_derivative_of_the_path(ends):
    data, noise = ends
    sigma = jnp.asarray([0.1, 0.5, 0.9])
    _, derivative = jax.jvp(lambda s: flow.interpolate(data, noise, s), (sigma,), (jnp.ones(3),))
    np.testing.assert_allclose(flow.velocity_target(data, noise), derivative, atol=1e-6)


def test_the_true_velocity_leads_back_to_the_data(ends):
    data, noise = ends
    v = flow.velocity_target(data, noise)
    one_step = flow.euler_step(noise, v, jnp.ones(3), jnp.zeros(3))
    np.testing.assert_allclose(one_step, data, atol=1e-6)
    sigma = jnp.asarray([0.2, 0.6, 1.0])
    np.testing.assert_allclose(flow.predict_data(flow.interpolate(data, noise, sigma), v, sigma), data, atol=1e-6)
    x = noise
    for now, after in itertools.pairwise(flow.sampling_sigmas(5, mu=0.8)):
        x = flow.euler_step(x, v, jnp.full(3, now), jnp.full(3, after))
    np.testing.assert_allclose(x, data, atol=2e-6)


@pytest.mark.parametrize("mu", [0.0, 1.15])
def test_euler_converges_with_first_order(mu):
    """dx/dsigma = x cos(3 sigma), whose solution is x(0) = x(1) exp(-sin(3) / 3)."""
    exact, errors = np.exp(-np.sin(3.0) / 3.0), []
    for steps in (32, 64, 128):
        x, sigmas = jnp.ones((1, 1, 1, 1)), flow.sampling_sigmas(steps, mu)
        for now, after in itertools.pairwise(sigmas):
            x = flow.euler_step(x, x * np.cos(3.0 * now), jnp.full(1, now), jnp.full(1, after))
        errors.append(abs(float(x[0, 0, 0, 0]) - exact))
    assert 1.8 < errors[0] / errors[1] < 2.2 and 1.8 < errors[1] / errors[2] < 2.2


@pytest.mark.parametrize(
    ("max_shift", "sigmas"), [(1.15, (1, 0.904531, 0.759511, 0.512844)), (1.16, (1, 0.905391, 0.761333, 0.515342))]
)
def test_schedule_at_1024_px_is_the_released_one(max_shift, sigmas):
    mu = flow.shift_mu(SchedulerConfig(max_shift=max_shift), 128, 128)
    np.testing.assert_allclose(flow.sampling_sigmas(4, mu), (*sigmas, 0.0), atol=6e-7)


def test_the_shift_is_linear_in_the_patches_of_one_panel():
    scheduler = SchedulerConfig(base_shift=0.5, max_shift=1.1)
    assert flow.shift_mu(scheduler, 32, 32) == pytest.approx(0.5)  # 256 patches of 2x2
    assert flow.shift_mu(scheduler, 128, 128) == pytest.approx(1.1)  # 4096
    assert flow.shift_mu(scheduler, 64, 136) == pytest.approx(0.5 + 0.6 * (64 * 136 / 4 - 256) / 3840)


def test_time_shift_is_the_formula_and_keeps_both_ends():
    s = np.linspace(0.01, 1.0, 50)
    np.testing.assert_allclose(flow.time_shift(s, 0.7), np.exp(0.7) / (np.exp(0.7) + (1.0 / s - 1.0)), rtol=1e-12)
    assert flow.time_shift(np.zeros(1), 0.7) == 0.0
    np.testing.assert_allclose(flow.time_shift(s, 0.0), s, rtol=1e-12)


def test_no_step_is_refused():
    with pytest.raises(UserError, match="steps is 0"):
        flow.sampling_sigmas(0, 1.0)


def test_training_sigmas_are_logit_normal_and_shifted():
    """The shift multiplies the odds by exp(mu), so that it adds mu to the logit."""
    sigma = flow.training_sigmas(jax.random.key(1), 20_000, mu=0.6, logit_mean=-0.3, logit_std=0.8)
    logits = np.log(sigma) - np.log1p(-sigma)
    assert sigma.shape == (20_000,) and sigma.min() > 0 and sigma.max() < 1
    assert logits.mean() == pytest.approx(0.3, abs=0.02) and logits.std() == pytest.approx(0.8, abs=0.02)
    again = flow.training_sigmas(jax.random.key(1), 20_000, mu=0.6, logit_mean=-0.3, logit_std=0.8)
    assert np.array_equal(sigma, again)
