"""The loop on a network of a few thousand parameters: it trains, exports, resumes to the bit after SIGKILL, says no."""

import json
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from runs import KillAtStep, die, finish, kill_while_saving_step_8, rows, saved_steps, start, weights

from dreamlite_jax import model_folder, train
from dreamlite_jax.config import to_dict
from dreamlite_jax.errors import UserError
from dreamlite_jax.parallel import sharding
from dreamlite_jax.training import checkpoint, clock, loop, state
from dreamlite_jax.training.build import build
from dreamlite_jax.training.config import load_config
from dreamlite_jax.training.errors import NonFiniteError

STEPS, DEVICES = 12, 2  # of `whole`; a checkpoint every 4 steps
KILLED = (-signal.SIGKILL,)


def kill_while_exporting(workdir: Path) -> None:
    model_folder.write_manifest = lambda *args: die()  # after the weights, before the folder has its name


@pytest.fixture(scope="module")
def root(run_root):
    return run_root


@pytest.fixture(scope="module")
def config(run_config):
    return run_config


def unfinished(workdir: Path, root: Path, name: str) -> Path:
    """A copy of a finished run without its export."""
    copy = shutil.copytree(workdir, root / name)
    shutil.rmtree(copy / "model")
    return copy


def test_it_trains_and_leaves_all_that_it_promises(whole):
    losses = [row["loss"] for row in rows(whole)]
    assert [row["step"] for row in rows(whole)] == list(range(1, STEPS + 1))
    assert len(set(losses)) == STEPS and np.isfinite(losses).all()
    assert saved_steps(whole) == ["12", "8"]  # the last two are kept
    assert (whole / "grids" / "step_000012.png").stat().st_size > 1000
    assert model_folder.load_config(whole / "model") == tiny.CONFIG
    provenance = model_folder.load_provenance(whole / "model")
    assert provenance["steps"] == STEPS and provenance["clock"]["train"] > 0
    trained, first = model_folder.load_params(whole / "model", "unet"), tiny.unet_params()
    assert not np.array_equal(trained["conv_out"]["kernel"], first["conv_out"]["kernel"])
    log = whole.with_suffix(".log").read_text()
    assert f"on {DEVICES} device(s)" in log and f"step {STEPS}/{STEPS}" in log and "ETA" in log


def test_killed_three_times_it_ends_with_the_same_bits(root, config, whole):
    workdir = root / "killed"
    finish(start(config, workdir, KillAtStep(7, saved=4)), workdir, KILLED)
    assert saved_steps(workdir) == ["4"]
    assert [row["step"] for row in rows(workdir)] == [1, 2, 3, 4, 5]  # more than the checkpoint knows
    finish(start(config, workdir, kill_while_saving_step_8), workdir, KILLED)
    assert saved_steps(workdir) == ["4"] and len(list((workdir / "checkpoints").iterdir())) > 1  # half of step 8
    finish(start(config, workdir, kill_while_exporting), workdir, KILLED)
    assert saved_steps(workdir) == ["12", "8"] and list(workdir.glob(".model.*")) and not (workdir / "model").exists()
    finish(start(config, workdir), workdir)

    assert weights(workdir) == weights(whole)
    assert rows(workdir) == rows(whole)  # each step once, with the same numbers
    assert sorted(p.name for p in workdir.iterdir()) == sorted(p.name for p in whole.iterdir())
    assert saved_steps(workdir) == sorted(p.name for p in (workdir / "checkpoints").iterdir())  # no rubbish stays
    log = workdir.with_suffix(".log").read_text()
    assert log.count("resumed from step 4") == 2 and log.count("resumed from step 12") == 1


# --- here


def test_a_finished_run_does_nothing(whole, config, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert train.main(["--config", config, "--workdir", str(whole)]) == 0
    assert "this run is complete after 12 steps" in capsys.readouterr().err
    run = build(load_config(config))
    for override, says in (
        ("steps=8", r"config.steps is 8, but .* has trained 12 steps"),
        ("stage=refl", "checkpoints of stage flow_matching, and config.stage is refl"),
        ("model.unet.ff_mult=2", r"another architecture: config.model.unet.ff_mult is 2, and 3 there"),
    ):
        with pytest.raises(UserError, match=says):
            loop.train(load_config(config, [override]), *run, whole)
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def cut_short(whole: Path, root: Path, name: str, steps: int) -> Path:
    """A run of 12 steps as one of fewer leaves it: the export of that step, and its checkpoint alone."""
    copy = shutil.copytree(whole, root / name)
    manifest = json.loads((copy / "model" / "model.json").read_text())
    manifest["provenance"]["steps"] = steps
    (copy / "model" / "model.json").write_text(json.dumps(manifest))
    shutil.rmtree(copy / "checkpoints" / "12")
    return copy


def test_a_run_that_a_smaller_number_of_steps_ended_goes_on(whole, root, config):
    """The checkpoint that it goes on from was saved by a config of 12 steps: it does not say that 12 are done."""
    workdir = cut_short(whole, root, "cut", 8)
    before = (workdir / "model" / "unet.safetensors").read_bytes()
    finish(start(config, workdir), workdir)
    assert weights(workdir) == weights(whole) and rows(workdir) == rows(whole)
    assert (workdir / "superseded" / "model_000008" / "unet.safetensors").read_bytes() == before
    log = workdir.with_suffix(".log").read_text()
    assert "model is of 8 steps and config.steps is 12: it moves to" in log and "resumed from step 8" in log
    assert train.main(["--config", config, "--workdir", str(workdir)]) == 0  # and now it is complete


def test_an_export_is_complete_only_for_the_steps_it_says(whole, root, config, capsys):
    arguments = ["--config", config, "--workdir"]
    alone = cut_short(whole, root, "alone", 8)
    shutil.rmtree(alone / "checkpoints")
    with pytest.raises(
        UserError, match=r"steps is 12, but the run in .* is complete after 8, and no checkpoint is left"
    ):
        train.main([*arguments, str(alone)])
    with pytest.raises(UserError, match=r"steps is 7, but the run in .* is complete after 8; use another"):
        train.main([*arguments, str(alone), "--config.steps=7"])
    assert (
        train.main([*arguments, str(alone), "--config.steps=8"]) == 0 and "complete after 8" in capsys.readouterr().err
    )
    foreign = root / "foreign"
    (foreign / "model").mkdir(parents=True)
    with pytest.raises(UserError, match=r"does not say after how many steps it was exported"):
        train.main([*arguments, str(foreign)])


@pytest.mark.parametrize("every", [{"log_every": 4, "checkpoint_every": 3}, {"log_every": 5, "grid_every": 2}])
def test_saves_and_grids_beside_log_steps_are_pauses(every, config, tmp_path, monkeypatch):
    """Half a second each, on a clock that only they move."""
    now, paused = [0.0], []

    def slow(function):
        def slowed(*args, **kwargs):
            now[0] += 0.5
            paused.append(1)
            return function(*args, **kwargs)

        return slowed

    monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(loop, "save_grid", slow(loop.save_grid))
    monkeypatch.setattr(checkpoint.Checkpoints, "save", slow(checkpoint.Checkpoints.save))
    settings = load_config(config, [f"{name}={value}" for name, value in every.items()])
    loop.train(settings, *build(settings), tmp_path)
    seconds = model_folder.load_provenance(tmp_path / "model")["clock"]
    assert seconds["train"] == 0 and seconds["pause"] == 0.5 * len(paused) and len(paused) >= 5


def test_a_checkpoint_of_another_architecture_is_refused(whole, root, config):
    workdir = unfinished(whole, root, "other")
    with pytest.raises(UserError, match=r"another architecture: config.model.unet.ff_mult is 2, and 3 there"):
        train.main(["--config", config, "--workdir", str(workdir), "--config.model.unet.ff_mult=2"])
    with pytest.raises(UserError, match=r"config.steps is 11, but .* has trained 12 steps"):
        train.main(["--config", config, "--workdir", str(workdir), "--config.steps=11"])
    assert saved_steps(workdir) == ["12", "8"] and rows(workdir) == rows(whole)


def test_settings_of_sampling_may_change_between_starts(whole, config):
    other = load_config(config, ["model.guidance_scale=3", "model.image_guidance_scale=2", "model.steps=4"])
    checkpoint.check_resume(whole, to_dict(other))
    with pytest.raises(UserError, match=r"another architecture: config.model.text.max_length is 32, and 64 there"):
        checkpoint.check_resume(whole, to_dict(load_config(config, ["model.text.max_length=32"])))


def test_what_is_not_finite_stops_the_run_and_spares_the_checkpoint(whole, root, config):
    """A learning rate of 1e30 ruins the parameters in step 13: its loss is still good, the norm of what it left not."""
    workdir = unfinished(whole, root, "diverged")
    overrides = ["--config.steps=20", "--config.optim.learning_rate=1e30"]
    with pytest.raises(
        NonFiniteError, match=r"step 13: param_norm inf.*The batch of this step is finite. A lower"
    ) as error:
        train.main(["--config", config, "--workdir", str(workdir), *overrides])
    assert error.value.step == 13 and not (workdir / "model").exists()
    assert [row["step"] for row in rows(workdir)] == list(range(1, 14))
    assert saved_steps(workdir) == ["12", "8"]
    good = state_of(workdir, config)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(good.params)) and int(good.step) == 12


def first_batch(run):
    return next(iter(run.feed.dataset(run.stage.fields)))


def state_of(workdir: Path, config: str) -> state.TrainState:
    """The last checkpoint's state."""
    settings = load_config(config)
    shapes = build(settings).stage.state_shapes()
    placement = sharding.state_sharding(sharding.make_mesh(settings.mesh), shapes)
    checkpoints = checkpoint.Checkpoints(workdir, keep=2)
    restored = checkpoints.restore(shapes, placement)
    checkpoints.close()
    return jax.device_get(restored.state)


def test_a_stage_starts_from_the_one_before(whole, config):
    exported = model_folder.load_params(whole / "model", "unet")
    for location in (whole, whole / "model"):  # a workdir or its model
        started = build(load_config(config, [f"init_from={location}"])).stage.init_state().params
        assert jax.tree.all(jax.tree.map(np.array_equal, jax.device_get(started), exported))
    other = build(load_config(config, [f"init_from={whole}", "model.unet.ff_mult=2"]))
    with pytest.raises(
        UserError, match=r"holds a U-Net of another architecture: config.model.unet.ff_mult is 2, and 3 there$"
    ):
        other.stage.init_state()


def test_check_says_what_would_run_and_leaves_nothing(root, config, capsys):
    assert train.main(["--config", config, "--workdir", str(root / "checked"), "--check"]) == 0
    said = capsys.readouterr().out
    count = sum(leaf.size for leaf in jax.tree.leaves(tiny.unet_params()))
    assert f"parameters: {count:,}" in said and "target (8, 4, 4, 4)" in said and "mse_edit" in said
    assert not (root / "checked").exists()


def test_the_stage_refuses_data_that_do_not_belong_together(root, config):
    def built(*overrides):
        return build(load_config(config, overrides))

    with pytest.raises(UserError, match=r"no complete set of latents"):
        built("data.sources.0.path=nowhere")
    with pytest.raises(UserError, match=r"nowhere.safetensors does not exist"):
        built("vae=nowhere.safetensors")
    with pytest.raises(UserError, match=r"another architecture: config.model.vae.width is 8, and 4 there"):
        built("model.vae.width=8")
    with pytest.raises(UserError, match=r"text_dim is 32, but the data have text states of width 384"):
        built("model.unet.text_dim=32")
    other = tiny.write_vae(root / "other.safetensors")
    for shards in ("t2i", "edit"):
        info = root / shards / "info.json"
        before = info.read_text()
        info.write_text(json.dumps(json.loads(before) | {"vae": to_dict(tiny.CONFIG.vae) | {"width": 8}}))
        with pytest.raises(UserError, match=f"{shards} holds latents of another autoencoder"):
            built(f"vae={other}")
        info.write_text(before)


def test_conditions_are_dropped_as_often_as_asked(config):
    """With every text and image dropped, prompts and sources do not matter; with none dropped they do."""
    settings = load_config(config)
    batch = first_batch(build(settings))
    changed = {**batch, "text": batch["text"] + 1.0, "source": batch["source"] + batch["editing"][:, None, None, None]}
    params = tiny.unet_params()
    for drop, equal in ((1.0, True), (0.0, False)):
        stage = build(load_config(config, [f"flow.text_drop={drop}", f"flow.image_drop={drop}"])).stage
        loss = jax.jit(stage.loss)
        a, b = (float(loss(params, x, jax.random.key(0))[0]) for x in (batch, changed))
        assert (a == b) == equal


def test_the_loss_is_the_weighted_error_of_the_target_panel(config):
    """Against its formula, with a U-Net whose last layer is zero: the prediction is 0, so the error is the target's."""
    run = build(load_config(config))
    stage, batch = run.stage, first_batch(run)
    params = tiny.unet_params()
    params["conv_out"] = jax.tree.map(np.zeros_like, jax.device_get(params["conv_out"]))
    key = jax.random.key(5)
    noise = np.asarray(jax.random.normal(jax.random.split(key, 4)[1], batch["target"].shape))
    error = np.square(noise - batch["target"])
    loss, values = jax.jit(stage.loss)(params, batch, key)
    np.testing.assert_allclose(float(loss), (batch["weight"] * error).mean() / batch["weight"].mean(), rtol=1e-5)
    per_item = error.mean((1, 2, 3))
    np.testing.assert_allclose(float(values["mse"]), per_item.mean(), rtol=1e-5)
    np.testing.assert_allclose(float(values["mse_edit"]), per_item[batch["editing"] == 1].mean(), rtol=1e-5)
    np.testing.assert_allclose(float(values["mse_generate"]), per_item[batch["editing"] == 0].mean(), rtol=1e-5)
    assert abs(float(loss) - float(values["mse"])) > 1e-4


def test_grids_show_results_beside_the_truth(config, caplog):
    run = build(load_config(config))
    picture = run.gallery.grid(jax.device_get(tiny.unet_params()))
    assert picture.dtype == np.uint8 and picture.shape[1] == 52 + 2 * 132  # two items and the rows' names
    params = jax.device_get(tiny.unet_params(seed=1))
    with jax.log_compiles():
        other = run.gallery.grid(params)
    assert not np.array_equal(picture, other) and "Compiling" not in caplog.text  # the first has compiled it all
    with jax.log_compiles():
        build(load_config(config)).gallery.grid(params)
    assert "Compiling" in caplog.text
    assert loop.check(load_config(config), run.stage, run.feed)  # and building shapes afterwards still works
