"""The optimiser against formulas written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamlite_jax.training import optim
from dreamlite_jax.training.config import OptimConfig
from dreamlite_jax.training.update import Update, step_key


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("constant", {0: 0.0, 5: 0.5, 10: 1.0, 60: 1.0, 110: 1.0}),
        ("linear", {0: 0.0, 5: 0.5, 10: 1.0, 60: 0.6, 110: 0.2}),
        ("cosine", {0: 0.0, 5: 0.5, 10: 1.0, 60: 0.6, 85: 0.2 + 0.8 * (1 + np.cos(0.75 * np.pi)) / 2, 110: 0.2}),
    ],
)
def test_schedules(decay, expected):
    config = OptimConfig(learning_rate=2.0, warmup_steps=10, decay=decay, final_fraction=0.2 * (decay != "constant"))
    schedule = optim.schedule(config, 110)
    for step, share in expected.items():
        assert float(schedule(step)) == pytest.approx(2.0 * share, abs=1e-5), step


def adamw(config, params, gradients):
    """AdamW as published (Loshchilov and Hutter, algorithm 2), after clipping by global norm; constant rate."""
    m = {k: np.zeros_like(v) for k, v in params.items()}
    v = {k: np.zeros_like(x) for k, x in params.items()}
    for t, grads in enumerate(gradients, 1):
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        for k, g in grads.items():
            g = g * min(1.0, config.clip_norm / norm)
            m[k] = config.b1 * m[k] + (1 - config.b1) * g
            v[k] = config.b2 * v[k] + (1 - config.b2) * g**2
            update = m[k] / (1 - config.b1**t) / (np.sqrt(v[k] / (1 - config.b2**t)) + 1e-8)
            decay = config.weight_decay if params[k].ndim > 1 else 0.0
            rate = config.learning_rate * (t > 1)  # one step of warmup, at rate 0
            params[k] = params[k] - rate * (update + decay * params[k])
    return params


def test_steps_are_clipped_adamw_without_decay_of_biases():
    config = OptimConfig(learning_rate=0.1, warmup_steps=1, weight_decay=0.3, clip_norm=0.5)
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=(4,))}
    gradients = [{k: rng.normal(size=v.shape) * scale for k, v in params.items()} for scale in (5.0, 0.01, 3.0, 0.2)]
    optimizer = optim.optimizer(config, 100)
    ours = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    opt_state = optimizer.init(ours)
    for grads in gradients:
        with jax.numpy_dtype_promotion("standard"):  # inside optax
            updates, opt_state = optimizer.update(jax.tree.map(jnp.float32, grads), opt_state, ours)
        ours = jax.tree.map(jnp.add, ours, updates)
    expected = adamw(config, params, gradients)
    for name in params:
        np.testing.assert_allclose(ours[name], expected[name], rtol=1e-4, atol=1e-5)


def test_the_average_is_young_first_and_slow_later():
    ema, params = {"w": jnp.zeros(2)}, {"w": jnp.ones(2)}
    for step, decay in ((0, 0.1), (90, 0.91), (10**6, 0.99)):
        new = optim.ema_update(ema, params, 0.99, jnp.float32(step))
        np.testing.assert_allclose(new["w"], 1.0 - decay, rtol=1e-5)


def test_a_step_depends_on_seed_and_step_alone():
    """The key of step n is the n-th fold of the seed, so a resumed run draws what an uninterrupted one draws."""

    def loss(params, batch, key):
        noise = jax.random.normal(key, ())
        return jnp.square(params["w"] - batch["x"].mean() - noise).sum(), {"noise": noise}

    config = OptimConfig(warmup_steps=1)
    update = Update(config, 10)

    @functools.partial(jax.jit, static_argnames="seed")
    def step(state, batch, seed=3):
        (value, metrics), grads = update.gradient(loss, state.params, batch, step_key(seed, state))
        return update.apply(state, grads, {"loss": value, **metrics})

    start = update.begin({"w": jnp.ones(2)})
    batch = {"x": jnp.ones(4)}
    first, one = step(start, batch)
    second, two = step(first, batch)
    assert int(second.step) == 2 and one["noise"] != two["noise"]
    expected = [float(jax.random.normal(jax.random.fold_in(jax.random.key(3), i), ())) for i in (0, 1)]
    np.testing.assert_allclose([float(one["noise"]), float(two["noise"])], expected, rtol=1e-6)
    _, other = step(start, batch, seed=4)
    assert other["noise"] != one["noise"]
    np.testing.assert_allclose(float(one["grad_norm"]), np.sqrt(2) * 2 * abs(float(one["noise"])), rtol=1e-5)
