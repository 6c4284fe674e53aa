"""ReFL and DMD2 in the loop, on the smallest network: killed they end with the same bits, collapsed they stop."""

import json
import signal
from pathlib import Path

import pytest
import tiny
from runs import KillAtStep, finish, rows, saved_steps, start, weights

from dreamlite_jax import model_folder

UNGUIDED = {"guidance_scale": 1.0, "image_guidance_scale": 1.0}
STAGES = {
    "refl": {
        "refl": {
            "rewards": [{"kind": "target"}], "steps": 2, "reward_weight": 0.1, "max_drift": 9.0, "min_diversity": 0.0,
        },
    },
    "dmd2": {
        "dmd": {
            "fake_updates": 2, "gan_generator_weight": 5e-3, "gan_fake_weight": 1e-2, "min_diversity": 0.0,
            "fake": {"learning_rate": 1e-3, "warmup_steps": 0},
        },
    },
}  # fmt: skip
LIMITS = {"refl": "--config.refl.max_drift=1e-4", "dmd2": "--config.dmd.min_diversity=50.0"}


def fingerprint(workdir: Path, step: int) -> dict:
    """Of every array of a checkpoint, by field."""
    return json.loads((workdir / "checkpoints" / str(step) / "meta" / "metadata").read_text())["fingerprint"]


pytestmark = pytest.mark.slow  # nine runs in processes of their own


@pytest.fixture(scope="module", params=list(STAGES))
def stage(request):
    return request.param


@pytest.fixture(scope="module")
def config(run_root, stage):
    mapping = tiny.train_config(run_root, stage=stage, steps=5, checkpoint_every=2, log_every=1, **STAGES[stage])
    mapping["model"] = {**mapping["model"], **UNGUIDED, "steps": 4}
    return str(tiny.write_config(run_root / f"{stage}.py", mapping))


@pytest.fixture(scope="module")
def undisturbed(run_root, stage, config):
    """Workdir of a run."""
    workdir = run_root / f"{stage}_whole"
    finish(start(config, workdir, devices=1), workdir)
    return workdir


def test_killed_it_ends_with_the_same_bits(run_root, stage, config, undisturbed):
    workdir = run_root / f"{stage}_killed"
    finish(start(config, workdir, KillAtStep(4, saved=2), devices=1), workdir, (-signal.SIGKILL,))
    assert saved_steps(workdir) == ["2"] and not (workdir / "model").exists()
    finish(start(config, workdir, devices=1), workdir)
    assert "resumed from step 2" in workdir.with_suffix(".log").read_text()
    assert rows(workdir) == rows(undisturbed) and len(rows(workdir)) == 5
    assert weights(workdir) == weights(undisturbed)
    one, other = fingerprint(undisturbed, 5), fingerprint(workdir, 5)
    own = {"refl": {"start", "vae", "rewards"}, "dmd2": {"fake", "fake_opt_state", "teacher"}}[stage]
    assert one == other and {"params", "ema", "opt_state", "step", *own} <= one.keys()
    before = fingerprint(undisturbed, 4)
    still = {"refl": {"start", "vae", "rewards"}, "dmd2": {"teacher"}}[stage]
    assert {name for name in one if one[name] and one[name] == before[name]} == still  # all else goes on learning


def test_it_logs_what_it_promises(stage, undisturbed):
    last = rows(undisturbed)[-1]
    if stage == "refl":
        assert {"reward", "reward_target", "flow_loss", "reward_loss", "mse_edit", "diversity"} <= last.keys()
        assert rows(undisturbed)[0]["drift"] < 1e-5 < last["drift"] and last["reward_target"] < 0
    else:
        assert {"matching_loss", "velocity_gap", "fake_loss", "fake_grad_norm", "diversity"} <= last.keys()
        assert last["gan_loss"] > 0 and 0 <= last["gan_accuracy"] <= 1


def test_the_export_carries_its_sampling_settings(undisturbed):
    exported = model_folder.load_config(undisturbed / "model")
    assert (exported.steps, exported.guidance_scale, exported.image_guidance_scale) == (4, 1.0, 1.0)


def test_a_collapse_stops_the_run_and_names_the_figure(run_root, stage, config, undisturbed):
    """The last good checkpoint stays. ReFL's first step has a learning rate of 0, so it is the third that has moved."""
    workdir = run_root / f"{stage}_collapsed"
    finish(start(config, workdir, flags=(LIMITS[stage],), devices=1), workdir, (1,))
    step, words, kept = {"refl": (3, "drift is ", ["2"]), "dmd2": (1, "diversity is ", [])}[stage]
    log = workdir.with_suffix(".log").read_text()
    assert f"CollapseError: step {step}: {words}" in log and "the model has collapsed; the last checkpoint" in log
    assert not (workdir / "model").exists() and len(rows(workdir)) == step and saved_steps(workdir) == kept
