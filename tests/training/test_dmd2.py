"""DMD2 against mathematics: Gaussians of known score, a student that moves onto its teacher, the sampler's sigmas."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import toys

from dreamlite_jax.diffusion import flow
from dreamlite_jax.errors import UserError
from dreamlite_jax.training.build import build
from dreamlite_jax.training.config import load_config
from dreamlite_jax.training.stages import dmd2
from dreamlite_jax.training.start import Given

UNGUIDED = {"guidance_scale": 1.0, "image_guidance_scale": 1.0}
TEACHER = toys.gaussian_params([1.0, -0.5], [[0.8, 0.0], [0.5, 0.4]])


def toy(velocity, steps: int = 4, student=None, **changes) -> dmd2.DMD2Stage:
    """The stage with a network of ours and no files."""
    config = toys.config("dmd2", **changes)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, steps=steps))
    student, teacher = Given(student), Given(TEACHER)
    return dmd2.DMD2Stage(config, toys.denoiser(config, velocity), student, toys.Dimmer(), teacher)


def log_density(x, params, sigma):
    """Of N(mean, chol cholᵀ), scaled and noised to sigma."""
    cov = (1 - sigma) ** 2 * params["chol"] @ params["chol"].T + sigma**2 * jnp.eye(2)
    centred = x - (1 - sigma) * params["mean"]
    return -0.5 * centred @ jnp.linalg.solve(cov, centred)


def test_the_gradient_is_the_difference_of_scores():
    """mu_fake - mu_real = s² / (1 - s) (score_fake - score_real), from densities that are known."""
    fake = toys.gaussian_params([0.2, 0.3], [[0.5, 0.0], [-0.2, 0.9]])
    rng = np.random.default_rng(0)
    sigma = np.linspace(0.1, 0.9, 16, dtype=np.float32)
    noisy, made = (rng.normal(size=(16, 1, 1, 2)).astype(np.float32) for _ in range(2))

    @jax.jit
    def found(made, noisy, sigma):
        level = sigma[:, None, None, None]
        velocities = (toys.gaussian(params, noisy, level, None, None) for params in (TEACHER, fake))
        return dmd2.matching_gradient(made, noisy, sigma, *velocities)

    gradient = found(made, noisy, sigma)
    score = jax.jit(jax.vmap(jax.grad(log_density), (0, None, 0)))
    flat = noisy[:, 0, 0]
    factor = (sigma**2 / (1 - sigma))[:, None]
    scores = score(flat, fake, sigma) - score(flat, TEACHER, sigma)
    predicted = (flat + sigma[:, None] ** 2 * score(flat, TEACHER, sigma)) / (1 - sigma)[:, None]
    scale = np.abs(made[:, 0, 0] - predicted).mean(1, keepdims=True)
    np.testing.assert_allclose(gradient[:, 0, 0], factor * scores / scale, rtol=2e-3, atol=2e-4)
    assert np.abs(gradient).max() > 0.5


@pytest.mark.parametrize("region_weight", [True, False])
def test_the_loss_has_that_gradient_and_a_fake_equal_to_the_teacher_has_none(region_weight):
    """What an edit changes weighs more, here one item in two three times as much; the weights' mean is 1."""
    stage = toy(toys.gaussian, steps=1, dmd={**UNGUIDED, "region_weight": region_weight})
    batch = toys.batch(8, (1, 1, 2))
    batch["weight"][::2] = 3.0
    weight = np.where(np.arange(8) % 2, 0.5, 1.5)[:, None] if region_weight else np.ones((8, 1))
    student = toys.gaussian_params([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]], turn=0.5)
    grad = jax.jit(jax.grad(stage.student_loss, has_aux=True))
    same, (_, values) = grad(student, {"unet": TEACHER}, TEACHER, batch, jax.random.key(0))
    assert values["velocity_gap"] < 1e-6 and all(np.abs(leaf).max() < 1e-6 for leaf in jax.tree.leaves(same))
    other, (made, values) = grad(student, {"unet": student}, TEACHER, batch, jax.random.key(0))
    assert np.linalg.norm(other["mean"]) > 0.05 and values["velocity_gap"] > 0.1
    # d loss / d mean is the weighted mean gradient of the pictures, which all move with it.
    _, level_key, noise_key = jax.random.split(jax.random.key(0), 3)
    sigma = stage.noise_levels(level_key, made)
    noisy = flow.interpolate(made, jax.random.normal(noise_key, made.shape), sigma)
    velocities = (toys.gaussian(p, noisy, sigma[:, None, None, None], None, None) for p in (TEACHER, student))
    gradients = dmd2.matching_gradient(made, noisy, sigma, *velocities)[:, 0, 0]
    expected = (np.float32(weight) * gradients).sum(0) / made.size
    np.testing.assert_allclose(other["mean"], expected, rtol=1e-3, atol=1e-5)


def test_the_fake_score_too_weighs_what_an_edit_changes():
    stage = toy(toys.gaussian, steps=1, dmd={**UNGUIDED, "region_weight": True})
    batch, made = toys.batch(8, (1, 1, 2)), toys.batch(8, (1, 1, 2), seed=1)["target"]
    found = []
    for heavier in (1.0, 3.0):
        batch["weight"][::2] = heavier
        level_key, noise_key, _ = jax.random.split(jax.random.key(3), 3)
        sigma, noise = stage.noise_levels(level_key, made), jax.random.normal(noise_key, made.shape)
        v = toys.gaussian(TEACHER, flow.interpolate(made, noise, sigma), sigma[:, None, None, None], None, None)
        weight = batch["weight"] / batch["weight"].mean()
        found.append(stage.fake_loss({"unet": TEACHER}, made, batch, jax.random.key(3))[0])
        np.testing.assert_allclose(found[-1], (weight * np.square(v - (noise - made))).mean(), rtol=1e-5)
    assert abs(found[0] - found[1]) > 0.01


def test_the_student_moves_onto_its_teacher():
    optim = {"learning_rate": 2e-2, "warmup_steps": 0, "ema_decay": 0.98, "weight_decay": 0.0}
    student = toys.gaussian_params([-0.5, 0.5], [[1.0, 0.0], [0.0, 1.0]], turn=0.3)
    fake = {name: value for name, value in optim.items() if name != "ema_decay"} | {"b2": 0.9}
    stage = toy(toys.gaussian, steps=1, student=student, optim=optim, dmd={**UNGUIDED, "fake_updates": 3, "fake": fake})
    batch = toys.batch(128, (1, 1, 2))
    state = stage.init_state()

    @jax.jit
    def run(state):
        return jax.lax.scan(lambda state, _: stage.step(state, batch), state, length=400)

    state, values = run(state)
    cov = TEACHER["chol"] @ TEACHER["chol"].T
    turn = state.ema["turn"]
    np.testing.assert_allclose(state.ema["mean"], TEACHER["mean"], atol=0.1)
    np.testing.assert_allclose(turn @ turn.T, cov, atol=0.15)
    assert np.abs(0.3**2 * np.eye(2) - cov).max() > 0.4  # which the start did not fulfil
    fake = state.extra["fake"]["unet"]  # which follows
    np.testing.assert_allclose(fake["mean"], state.params["mean"], atol=0.2)
    assert all(np.array_equal(state.frozen["teacher"][name], TEACHER[name]) for name in TEACHER)
    assert int(state.step) == 400 and np.isfinite(values["loss"]).all()


def test_the_fake_score_follows_alike_in_a_loop_and_written_out(monkeypatch):
    """What accelerators run, a loop, beside what CPUs run."""
    fake = {"learning_rate": 1e-2, "warmup_steps": 0}
    student = toys.gaussian_params([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]], turn=0.5)
    stage = toy(toys.gaussian, steps=2, student=student, dmd={**UNGUIDED, "fake_updates": 3, "fake": fake})
    batch = toys.batch(8, (1, 1, 2))
    state = stage.init_state()
    written_out, _ = jax.jit(lambda state: stage.step(state, batch))(state)
    monkeypatch.setattr(dmd2.blocks, "platform", lambda: "tpu")
    looped, values = jax.jit(lambda state: stage.step(state, batch))(state)
    assert str(jax.make_jaxpr(lambda state: stage.step(state, batch))(state)).count("scan[") >= 2
    one, other = looped.extra["fake"], written_out.extra["fake"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, other)
    assert np.abs(one["unet"]["mean"] - TEACHER["mean"]).max() > 1e-2 and values["fake_loss"].shape == ()


def plain(params, x, sigma, source, words):
    """Depends on all that it is given."""
    return jnp.sin(x * params["a"]) + 0.3 * source + words * sigma


def test_the_student_is_sampled_at_the_mobile_sampler_s_sigmas():
    seen = []

    def spying(params, x, sigma, source, words):
        jax.debug.callback(lambda s: seen.append(float(s)), sigma[0, 0, 0, 0])
        return plain(params, x, sigma, source, words)

    stage = toy(spying)
    batch = toys.batch(2, (4, 4, 2))
    made = jax.jit(lambda key: stage.generate({"a": jnp.float32(0.7)}, batch, key))
    stops = set()
    for seed in range(12):
        seen.clear()
        made(jax.random.key(seed)).block_until_ready()
        jax.effects_barrier()
        expected = flow.sampling_sigmas(4, flow.shift_mu(stage.config.model.scheduler, 4, 4))[: len(seen)]
        np.testing.assert_allclose(sorted(seen, reverse=True), expected, rtol=1e-6)
        stops.add(len(seen))
    assert stops == {1, 2, 3, 4}


def test_the_teacher_is_guided_once_to_generate_and_twice_to_edit():
    """In one batch of both, against the formulas of the sampler, branch by branch."""
    stage = toy(plain, dmd={"guidance_scale": 3.0, "image_guidance_scale": 1.5})
    batch, params = toys.batch(2, (4, 4, 2)), {"a": jnp.float32(0.7)}
    sigma = jnp.asarray([0.3, 0.8])
    noisy = batch["target"]
    got = stage.teacher_velocity(params, noisy, sigma, batch)
    words = batch["text"].mean((1, 2))[:, None, None, None]
    s = sigma[:, None, None, None]
    null, image, text = (
        plain(params, noisy, s, source, said)
        for source, said in ((0 * noisy, 0 * words), (batch["source"], 0 * words), (batch["source"], words))
    )
    single = null + 3.0 * (text - null)
    dual = null + 3.0 * (text - image) + 1.5 * (image - null)
    np.testing.assert_allclose(got[0], single[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[1], dual[1], rtol=1e-4, atol=1e-5)
    assert np.abs(single[1] - dual[1]).max() > 0.05


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.guidance_scale=3.0"], "config.model.guidance_scale is 3.0; a distilled model is sampled without"),
        (["model.image_guidance_scale=1.5"], "config.model.image_guidance_scale is 1.5"),
        (["init_from=''"], "config.dmd.teacher and config.init_from are empty"),
        (["dmd.gan_fake_weight=0.01"], "both or neither must be above 0"),
        (["dmd.noise_range=(0.5, 0.2)"], "config.dmd.noise_range is .* 0 < low < high < 1"),
        (
            ["dmd.region_weight=True", "flow.region_weight=False"],
            "config.dmd.region_weight is True, but flow.region_weight False; set both",
        ),
        (["dmd.fake_updates=0"], "config.dmd.fake_updates is 0"),
        (["dmd.fake_update=2"], "did you mean 'fake_updates'"),
    ],
)
def test_what_cannot_be_distilled_is_refused(tmp_path, overrides, says):
    tiny.write_inputs(tmp_path)
    mapping = tiny.train_config(tmp_path, stage="dmd2")
    mapping["model"] = {**mapping["model"], **UNGUIDED}
    file = str(tiny.write_config(tmp_path / "config.py", mapping))
    with pytest.raises(UserError, match=says):
        build(load_config(file, overrides)).stage.init_state()
