"""The sampler against a loop written by hand, with a velocity that depends on everything it is given."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamlite_jax.diffusion import flow, guidance, panels, sampler

B, H, W, C, S, D = 2, 2, 4, 3, 5, 6
SIGMAS = flow.sampling_sigmas(4, mu=0.9)


def velocity(canvas, timestep, text, mask, time_ids):
    """Any function whose left half depends on the right one, on time, on the unmasked text and on the size."""
    words = (text * mask[:, :, None]).mean((1, 2)) + time_ids[:, 0] / 100.0 - time_ids[:, 1] / 300.0
    words = words[:, None, None, None]
    ramp = jnp.linspace(-1.0, 2.0, canvas.shape[2])[None, None, :, None]
    return jnp.sin(canvas) * ramp + canvas[:, :, ::-1] * words + (timestep / 1000.0)[:, None, None, None]


@pytest.fixture(scope="module")
def given():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    def text(b):
        return sampler.TextStatesMask(normal(b, S, D), jnp.asarray(rng.random((b, S)) < 0.7, jnp.float32))

    return {
        "noise": normal(B, H, W, C),
        "source": normal(B, H, W, C),
        "prompt": text(B),
        "null": text(1),
        "sizes": jnp.asarray([[16.0, 8.0], [24.0, 8.0]]),
    }


def run(given, plan, scales, **options):
    seen = sampler.condition(plan, given["prompt"], given["null"], given["source"])
    return sampler.sample(velocity, given["noise"], seen, given["sizes"], jnp.asarray(SIGMAS), *scales, **options)


def by_hand(given, plan, scales, compose=panels.compose):
    x = given["noise"]
    for now, after in itertools.pairwise(SIGMAS):
        branches = []
        for branch in plan:
            name = "prompt" if branch.text else "null"
            states, mask = (jnp.broadcast_to(a, (B, *a.shape[1:])) for a in given[name])
            image = given["source"] if branch.image else jnp.zeros_like(x)
            canvas = compose(x, image)
            branches.append(velocity(canvas, jnp.full(B, 1000.0 * now), states, mask, given["sizes"])[:, :, :W])
        if len(plan) == 1:
            v = branches[0]
        elif len(plan) == 2:
            v = branches[0] + scales[0] * (branches[1] - branches[0])
        else:
            v = branches[0] + scales[0] * (branches[2] - branches[1]) + scales[1] * (branches[1] - branches[0])
        x = x + (after - now) * v
    return x


@pytest.mark.parametrize("plan", [guidance.UNGUIDED, guidance.SINGLE, guidance.DUAL])
def test_the_scan_is_the_loop(given, plan):
    scales = (2.5, 1.5)
    result, trajectory = jax.jit(lambda: run(given, plan, scales))()
    np.testing.assert_allclose(result, by_hand(given, plan, scales), rtol=1e-4, atol=1e-5)
    assert trajectory.shape == (len(SIGMAS) - 1, B, H, W, C)
    np.testing.assert_allclose(trajectory[-1], result, atol=1e-5)  # the last step lands on its own prediction


def test_swapped_panels_are_noticed(given):
    result, _ = run(given, guidance.DUAL, (2.5, 1.5))
    swapped = by_hand(given, guidance.DUAL, (2.5, 1.5), compose=lambda target, source: panels.compose(source, target))
    assert np.abs(result - swapped).max() > 0.1


def test_a_straight_field_is_integrated_exactly(given):
    """With the true velocity of the straight path, any number of steps gives the data."""
    data = given["source"]
    v = panels.compose(flow.velocity_target(data, given["noise"]), data)
    seen = sampler.condition(guidance.UNGUIDED, given["prompt"], given["null"], data)
    for steps in (1, 7):
        sigmas = jnp.asarray(flow.sampling_sigmas(steps, mu=0.5))
        result, trajectory = sampler.sample(lambda *_: v, given["noise"], seen, given["sizes"], sigmas)
        np.testing.assert_allclose(result, data, atol=1e-5)
        np.testing.assert_allclose(trajectory, jnp.broadcast_to(data, trajectory.shape), atol=1e-5)


def test_all_branches_of_a_step_are_one_call(given):
    calls = []

    def counting(canvas, *rest):
        calls.append(canvas.shape)
        return velocity(canvas, *rest)

    seen = sampler.condition(guidance.DUAL, given["prompt"], given["null"], given["source"])
    x, sigma = given["noise"], jnp.float32(0.5)
    sampler.guided_velocity(counting, x, sigma, seen, given["sizes"], 2.0, 1.0)
    assert calls == [(3 * B, H, 2 * W, C)]


def test_a_branch_sees_only_what_it_may(given):
    seen = sampler.condition(guidance.DUAL, given["prompt"], given["null"], given["source"])
    assert not seen.image[0].any()
    assert np.array_equal(seen.image[1], given["source"]) and np.array_equal(seen.image[2], given["source"])
    for got, name in zip(seen.text, ("null", "null", "prompt"), strict=True):
        assert np.array_equal(got, np.broadcast_to(given[name].states, got.shape))


def test_channel_layout_stacks_the_condition(given):
    shapes = []

    def stacked(canvas, *rest):
        shapes.append(canvas.shape)
        return canvas[..., :C] + canvas[..., C:]

    seen = sampler.condition(guidance.UNGUIDED, given["prompt"], given["null"], given["source"])
    x = given["noise"]
    v = sampler.guided_velocity(stacked, x, jnp.float32(1.0), seen, given["sizes"], 1.0, 1.0, "channel")
    assert shapes == [(B, H, W, 2 * C)]
    np.testing.assert_allclose(v, x + given["source"], atol=1e-6)


def test_noise_depends_on_its_own_seed_alone():
    shape = (4, 6, 3)
    alone = sampler.noise_from_seeds([7], shape)
    among = sampler.noise_from_seeds([3, 7, 2**32 - 1], shape)
    assert np.array_equal(alone[0], among[1])
    assert np.array_equal(among, sampler.noise_from_seeds([3, 7, 2**32 - 1], shape))
    assert np.abs(among[0] - among[1]).max() > 0.1 and np.abs(among[1] - among[2]).max() > 0.1
    many = sampler.noise_from_seeds(range(50), (8, 8, 4))
    assert abs(float(many.mean())) < 0.02 and abs(float(many.std()) - 1.0) < 0.02


@pytest.mark.parametrize("plan", [guidance.UNGUIDED, guidance.DUAL])
@pytest.mark.parametrize("stop", [0, 1, 3, 4])
def test_a_rollout_is_the_sampler_stopped_early(given, plan, stop):
    """To the bit where no compiler fuses, and to rounding with a stop that the compiler does not know."""
    seen = sampler.condition(plan, given["prompt"], given["null"], given["source"])
    scales = (2.5, 1.5)

    def rolled(stop):
        return sampler.rollout(velocity, given["noise"], seen, given["sizes"], SIGMAS, stop, *scales)

    def sampled(noise, sigmas):
        return sampler.sample(velocity, noise, seen, given["sizes"], jnp.asarray(sigmas), *scales)[0]

    with jax.disable_jit():
        reached, expected = rolled(stop), sampled(given["noise"], SIGMAS[: stop + 1]) if stop else given["noise"]
        assert np.array_equal(reached, expected)
        if 0 < stop < 4:
            assert np.array_equal(sampled(reached, SIGMAS[stop:]), sampled(given["noise"], SIGMAS))
    np.testing.assert_allclose(jax.jit(rolled)(stop), expected, rtol=1e-5, atol=1e-5)


def test_a_rollout_calls_the_network_once_a_step(given):
    calls = []

    def counted(*inputs):
        jax.debug.callback(lambda t: calls.append(float(t)), inputs[1][0])
        return velocity(*inputs)

    seen = sampler.condition(guidance.UNGUIDED, given["prompt"], given["null"], given["source"])
    roll = jax.jit(lambda stop: sampler.rollout(counted, given["noise"], seen, given["sizes"], SIGMAS, stop))
    roll(2).block_until_ready()
    jax.effects_barrier()
    np.testing.assert_allclose(sorted(calls, reverse=True), 1000.0 * SIGMAS[:2], rtol=1e-6)


def test_a_prediction_is_the_preview_of_the_step(given):
    seen = sampler.condition(guidance.SINGLE, given["prompt"], given["null"], given["source"])
    _, previews = sampler.sample(velocity, given["noise"], seen, given["sizes"], jnp.asarray(SIGMAS), 2.5)
    x = sampler.rollout(velocity, given["noise"], seen, given["sizes"], SIGMAS, 2, 2.5)
    shown = sampler.predict(velocity, x, jnp.asarray(SIGMAS)[2], seen, given["sizes"], 2.5)
    np.testing.assert_allclose(shown, previews[2], rtol=1e-5, atol=1e-6)
