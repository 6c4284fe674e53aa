"""ReFL against finite differences and the sampler, on a network of two numbers; thresholds, tasks and the drift."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import toys

from dreamlite_jax.diffusion import flow, guidance, sampler
from dreamlite_jax.errors import UserError
from dreamlite_jax.rewards.base import RewardSum, Term
from dreamlite_jax.training.build import build
from dreamlite_jax.training.config import load_config
from dreamlite_jax.training.stages import refl
from dreamlite_jax.training.start import Given

PARAMS = {"a": jnp.float32(0.7), "b": jnp.float32(0.2)}
KEY = jax.random.key(3)
BATCH = toys.batch(4, (4, 4, 3))


def velocity(params, x, sigma, source, words):
    """Depends on all that it is given."""
    return jnp.sin(x * params["a"]) * (0.5 + sigma) + params["b"] * (0.3 * source + words)


class Bright:
    """Scores a picture by its mean, bent so that the slope differs from picture to picture."""

    def __init__(self):
        self.params = {}

    def prepare(self, prompts):
        return {}

    def __call__(self, params, images, context):
        return jnp.tanh(images.mean((1, 2, 3)) + 0.1 * context.source.mean((1, 2, 3)))


def toy(threshold=None, tasks=("generate", "edit"), reward=None, name="bright", **changes) -> refl.ReFLStage:
    """The stage with a network, a decoder and a reward of ours, and no files."""
    rewards = ({"kind": "target", "threshold": threshold},)
    config = toys.config(
        "refl", refl={"rewards": rewards, "steps": 4, "late_share": 0.5, "reward_weight": 1.0, **changes},
        optim={"learning_rate": 1e-2, "warmup_steps": 0},
    )  # fmt: skip
    terms = RewardSum([Term(name, reward or Bright(), 2.0, tasks)])
    return refl.ReFLStage(config, toys.denoiser(config, velocity), Given(PARAMS), toys.Dimmer(), terms)


def reward_loss(stage, params, x, sigma):
    return stage.reward_loss(stage.scores(FROZEN, stage.predicted_data(params, x, sigma, BATCH), BATCH))


FROZEN = {"start": PARAMS, "vae": {}, "rewards": {"bright": {}}}


def gradient(stage, params=PARAMS):
    return jax.jit(jax.grad(stage.loss, has_aux=True))(params, FROZEN, BATCH, KEY)


@pytest.mark.parametrize("scales", [(1.0, 1.0), (3.0, 1.5)])
def test_the_gradient_is_that_of_finite_differences(scales):
    """Of the one step: what came before it stays where it is."""
    stage = toy(flow_weight=0.0, guidance_scale=scales[0], image_guidance_scale=scales[1])
    grads, values = gradient(stage)
    _, roll_key = jax.random.split(KEY)
    reach, loss = jax.jit(stage.rollout_to_late_step), jax.jit(functools.partial(reward_loss, stage))
    x, sigma = reach(PARAMS, BATCH, roll_key)
    for name, h in (("a", 1e-2), ("b", 1e-2)):
        up, down = ({**PARAMS, name: PARAMS[name] + side * h} for side in (1, -1))
        difference = (loss(up, x, sigma) - loss(down, x, sigma)) / (2 * h)
        np.testing.assert_allclose(grads[name], difference, rtol=1e-2)
        assert abs(difference) > 1e-3
        moved = {**PARAMS, name: PARAMS[name] + h}  # with the rollout moving too the slope is another
        whole = (loss(moved, *reach(moved, BATCH, roll_key)) - loss(PARAMS, x, sigma)) / h
        assert abs(whole - difference) > 0.05 * abs(difference)
    np.testing.assert_allclose(values["reward_loss"], loss(PARAMS, x, sigma), rtol=1e-5)
    np.testing.assert_allclose(values["reward"], -values["reward_loss"], rtol=1e-5)


def test_the_rollout_is_the_sampler_s_own_to_a_late_step():
    stage = toy()
    stops = set()
    sigmas = flow.sampling_sigmas(4, flow.shift_mu(stage.config.model.scheduler, 4, 4))
    for seed in range(4):
        with jax.disable_jit():
            x, sigma = stage.rollout_to_late_step(PARAMS, BATCH, jax.random.key(seed))
            noise_key, _ = jax.random.split(jax.random.key(seed))
            noise = jax.random.normal(noise_key, BATCH["target"].shape)
            stop = int(np.flatnonzero(sigmas == np.float32(sigma))[0])
            seen = stage.denoiser.conditioning(guidance.UNGUIDED, BATCH)
            reached, _ = sampler.sample(stage.denoiser.velocity(PARAMS), noise, seen, BATCH["size"], sigmas[: stop + 1])
        assert np.array_equal(x, reached)
        stops.add(stop)
    assert stops == {2, 3}  # the last half of four


def test_a_reward_above_the_threshold_gives_no_gradient():
    stage = toy(flow_weight=0.0)
    _, values = gradient(stage)
    score = float(values["reward_bright"])
    for push, far, near in (("below", score - 2, score + 2), ("above", score + 2, score - 2)):
        none, _ = gradient(toy(far, flow_weight=0.0, push=push))
        some, _ = gradient(toy(near, flow_weight=0.0, push=push))
        assert all(float(g) == 0.0 for g in none.values())
        full, _ = gradient(stage)
        for name in PARAMS:  # beyond the threshold the loss is the score's negative, but for a constant
            np.testing.assert_allclose(some[name], full[name], rtol=1e-5)
    part = refl.Part(jnp.asarray([1.0, 3.0]), jnp.ones(2))
    assert float(refl.reward_loss(part, 2.0, stage.config.refl)) == 0.5  # the first alone falls short, by 1


def test_a_reward_of_edits_leaves_generation_alone():
    stage = toy(tasks=("edit",))

    def loss(latents):
        return stage.reward_loss(stage.scores(FROZEN, latents, BATCH))

    slope = np.abs(jax.jit(jax.grad(loss))(BATCH["target"])).max((1, 2, 3))
    assert (slope[BATCH["editing"] == 0] == 0).all() and (slope[BATCH["editing"] == 1] > 0).all()


def test_drift_is_the_distance_from_the_start_and_steps_raise_the_reward():
    stage = toy(flow_weight=0.1)
    state = stage.init_state()

    @jax.jit
    def reward(params):
        """On the same noise, before and after."""
        keys = jax.random.split(jax.random.key(9), 16)
        return jax.vmap(lambda key: stage.loss(params, FROZEN, BATCH, key)[1]["reward"])(keys).mean()

    before = reward(state.params)
    state, values = jax.jit(lambda s: jax.lax.scan(lambda s, _: stage.step(s, BATCH), s, length=30))(state)
    drift = values["drift"]
    assert drift[0] < 1e-5 and 0.05 < drift[10] < drift[29]
    assert reward(state.params) > before + 0.02
    assert int(state.step) == 30 and state.frozen["start"]["a"] == PARAMS["a"] and state.params["a"] != PARAMS["a"]
    assert {"loss", "grad_norm", "flow_loss", "reward_loss", "reward_bright", "diversity"} <= values.keys()


def test_tokens_of_the_prompts_reach_the_reward():
    class Wordy(Bright):
        def prepare(self, prompts):
            return {"ids": np.asarray([[len(p), 1] for p in prompts], np.int32)}

        def __call__(self, params, images, context):
            return context.tokens["ids"][:, 0].astype(jnp.float32)

    stage = toy(reward=Wordy(), name="wordy")
    batch = BATCH | stage.fields(["a", "abc", "", "abcd"])
    parts = stage.scores({"vae": {}, "rewards": {"wordy": {}}}, jnp.asarray(batch["target"]), batch)
    assert parts["wordy"].score.tolist() == [1.0, 3.0, 0.0, 4.0]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["refl.rewards=()"], "config.refl.rewards is empty"),
        (["refl.late_share=0.0"], "config.refl.late_share is 0.0"),
        (["refl.steps=0"], "config.refl.steps is 0"),
        (["refl.push=up"], "config.refl.push is 'up'; it must be one of 'below', 'above'"),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path, overrides, says):
    tiny.write_inputs(tmp_path)
    mapping = tiny.train_config(tmp_path, stage="refl", refl={"rewards": ({"kind": "target"},)})
    file = str(tiny.write_config(tmp_path / "config.py", mapping))
    with pytest.raises(UserError, match=says):
        build(load_config(file, overrides))


def test_the_late_steps_are_the_last_ones():
    config = toy().config.refl
    assert [refl.first_late_step(dataclasses.replace(config, steps=n)) for n in (1, 2, 4, 28)] == [0, 1, 2, 14]
    assert refl.first_late_step(dataclasses.replace(config, steps=28, late_share=0.01)) == 27


def test_the_full_size_has_the_published_judges_and_thresholds():
    config = load_config(f"{Path(__file__).parents[2]}/configs/dreamlite_post.py:refl,ROOT")
    rewards = [(reward.kind, reward.threshold, reward.tasks) for reward in config.refl.rewards]
    assert rewards == [("hpsv3", 11.0, ("generate",)), ("editreward", 2.5, ("edit",))]
    assert config.init_from == "ROOT/runs/sft" and config.refl.push == "below" and config.refl.steps == 28


def test_a_judge_is_shown_pictures_of_one_size(tmp_path):
    """Said before the judge is read: its files are not here."""
    tiny.write_inputs(tmp_path)
    reward = {"kind": "hpsv3", "checkpoint": str(tmp_path / "none"), "base": str(tmp_path), "size_px": (16, 16)}
    mapping = tiny.train_config(tmp_path, stage="refl", refl={"rewards": (reward,)})
    file = str(tiny.write_config(tmp_path / "config.py", mapping))
    with pytest.raises(UserError, match=r"checkpoint .*none does not exist"):
        build(load_config(file))
    for sizes, found, size_px in (([[16, 16], [24, 8]], "24 x 8", "16 x 16"), ([], "16 x 16", "16 x 32")):
        width, height = map(int, size_px.split(" x "))
        mapping["refl"]["rewards"][0]["size_px"] = (height, width)
        file = str(tiny.write_config(tmp_path / "config.py", mapping))
        info = json.loads((tmp_path / "t2i" / "info.json").read_text())
        (tmp_path / "t2i" / "info.json").write_text(json.dumps(info | {"buckets": sizes}))
        np.save(tmp_path / "t2i" / "buckets.npy", np.arange(16) % 2)
        with pytest.raises(UserError, match=f"t2i has pictures of {found}; hpsv3 is shown .* {size_px} alone"):
            build(load_config(file))
