"""The loop on a network of a few thousand parameters: it trains, exports, resumes to the bit after SIGKILL, says no."""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from dreamlite_jax import model_folder, train
from dreamlite_jax.config import to_dict
from dreamlite_jax.errors import UserError
from dreamlite_jax.training import checkpoint, loop, metrics, optim, sharding, state
from dreamlite_jax.training.config import MeshConfig, load_config
from dreamlite_jax.training.errors import NonFiniteError
from dreamlite_jax.training.stages.flow_matching import FlowMatchingStage

STEPS, DEVICES = 12, 2  # a checkpoint every 4 steps


# --- runs in processes of their own, because they are killed


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_step_7(workdir: Path) -> None:
    add = metrics.Metrics.add

    def adding(self, step, values):
        add(self, step, values)
        if step == 7:
            while not (workdir / "checkpoints" / "4").is_dir():  # the save of step 4 ends in the background
                time.sleep(0.01)
            die()

    metrics.Metrics.add = adding


def kill_while_saving_step_8(workdir: Path) -> None:
    save = checkpoint.Checkpoints.save

    def saving(self, step, *args):
        save(self, step, *args)  # returns while the files are being written
        if step == 8:
            die()

    checkpoint.Checkpoints.save = saving


def kill_while_exporting(workdir: Path) -> None:
    model_folder.write_manifest = lambda *args: die()  # after the weights, before the folder has its name


def run(config: str, workdir: Path, prepare=None) -> None:
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES} --xla_backend_optimization_level=0"
    jax.config.update("jax_compilation_cache_dir", str(workdir.parent / "cache"))  # as the quick start does
    if prepare:
        prepare(workdir)
    with workdir.with_suffix(".log").open("a", buffering=1) as log:
        sys.stderr = sys.stdout = log
        sys.exit(train.main(["--config", config, "--workdir", str(workdir)]))


PROCESSES = multiprocessing.get_context("forkserver")  # imports once, and forks from there
PROCESSES.set_forkserver_preload(["dreamlite_jax.training.loop", "dreamlite_jax.training.stages.flow_matching"])


def start(*args):
    process = PROCESSES.Process(target=run, args=args)
    process.start()
    return process


def finish(process, workdir: Path) -> int:
    process.join(timeout=1200)
    assert process.exitcode is not None, "the run hangs"
    assert process.exitcode <= 0, workdir.with_suffix(".log").read_text()
    return process.exitcode


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.write_inputs(tmp_path_factory.mktemp("loop"))


@pytest.fixture(scope="module")
def config(root):
    return str(tiny.write_config(root / "config.py", tiny.train_config(root, steps=STEPS)))


@pytest.fixture(scope="module")
def whole(root, config):
    """Workdir of a run that nobody disturbed."""
    process = start(config, root / "whole")
    assert finish(process, root / "whole") == 0
    return root / "whole"


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def saved_steps(workdir: Path) -> list[str]:
    return sorted(path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())


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
    assert finish(start(config, workdir, kill_at_step_7), workdir) == -signal.SIGKILL
    assert saved_steps(workdir) == ["4"]
    assert [row["step"] for row in rows(workdir)] == [1, 2, 3, 4, 5]  # more than the checkpoint knows
    assert finish(start(config, workdir, kill_while_saving_step_8), workdir) == -signal.SIGKILL
    assert saved_steps(workdir) == ["4"] and len(list((workdir / "checkpoints").iterdir())) > 1  # half of step 8
    assert finish(start(config, workdir, kill_while_exporting), workdir) == -signal.SIGKILL
    assert saved_steps(workdir) == ["12", "8"] and list(workdir.glob(".model.*")) and not (workdir / "model").exists()
    assert finish(start(config, workdir), workdir) == 0

    assert (workdir / "model" / "unet.safetensors").read_bytes() == (whole / "model" / "unet.safetensors").read_bytes()
    assert rows(workdir) == rows(whole)  # each step once, with the same numbers
    assert sorted(p.name for p in workdir.iterdir()) == sorted(p.name for p in whole.iterdir())
    assert saved_steps(workdir) == sorted(p.name for p in (workdir / "checkpoints").iterdir())  # no rubbish stays
    log = workdir.with_suffix(".log").read_text()
    assert log.count("resumed from step 4") == 2 and log.count("resumed from step 12") == 1


# --- here


def test_a_finished_run_does_nothing(whole, config, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert train.main(["--config", config, "--workdir", str(whole)]) == 0
    assert "this run is complete" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_a_checkpoint_of_another_architecture_is_refused(whole, root, config):
    workdir = unfinished(whole, root, "other")
    with pytest.raises(UserError, match=r"another architecture: model.unet.ff_mult is 3 there and 2 here"):
        train.main(["--config", config, "--workdir", str(workdir), "--config.model.unet.ff_mult=2"])
    with pytest.raises(UserError, match=r"config.steps is 11, but .* has trained 12 steps"):
        train.main(["--config", config, "--workdir", str(workdir), "--config.steps=11"])
    assert saved_steps(workdir) == ["12", "8"] and rows(workdir) == rows(whole)


def test_what_is_not_finite_stops_the_run_and_spares_the_checkpoint(whole, root, config):
    """A learning rate of 1e30 ruins the parameters in step 13; its loss is still good, that of step 14 is not."""
    workdir = unfinished(whole, root, "diverged")
    overrides = ["--config.steps=20", "--config.optim.learning_rate=1e30"]
    with pytest.raises(NonFiniteError, match="step 14") as error:
        train.main(["--config", config, "--workdir", str(workdir), *overrides])
    assert error.value.step == 14 and not (workdir / "model").exists()
    assert [row["step"] for row in rows(workdir)] == list(range(1, 15))
    assert saved_steps(workdir) == ["12", "8"]
    good = state_of(workdir, config)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(good.params)) and int(good.step) == 12


def state_of(workdir: Path, config: str) -> state.TrainState:
    """The last checkpoint's state."""
    settings = load_config(config)
    stage = FlowMatchingStage(settings)
    optimizer = optim.optimizer(settings.optim, settings.steps)
    shapes = jax.eval_shape(lambda key: state.create(stage.init_params(key), optimizer), jax.random.key(0))
    placement = sharding.state_sharding(sharding.make_mesh(settings.mesh), shapes)
    checkpoints = checkpoint.Checkpoints(workdir, keep=2)
    restored = checkpoints.restore(checkpoints.latest_step(), shapes, placement, iter(stage.dataset()))
    checkpoints.close()
    return jax.device_get(restored)


def test_a_stage_starts_from_the_one_before(whole, config):
    exported = model_folder.load_params(whole / "model", "unet")
    for location in (whole, whole / "model"):  # a workdir or its model
        stage = FlowMatchingStage(load_config(config, [f"init_from={location}"]))
        started = stage.init_params(jax.random.key(0))
        assert jax.tree.all(jax.tree.map(np.array_equal, jax.device_get(started), exported))
    other = FlowMatchingStage(load_config(config, [f"init_from={whole}", "model.unet.ff_mult=2"]))
    with pytest.raises(UserError, match="U-Net of another architecture"):
        other.init_params(jax.random.key(0))


def test_check_says_what_would_run_and_leaves_nothing(root, config, capsys):
    assert train.main(["--config", config, "--workdir", str(root / "checked"), "--check"]) == 0
    said = capsys.readouterr().out
    count = sum(leaf.size for leaf in jax.tree.leaves(tiny.unet_params()))
    assert f"parameters: {count:,}" in said and "target (8, 4, 4, 4)" in said and "mse_edit" in said
    assert not (root / "checked").exists()


def losses_on(config, stage, mesh, batches) -> list[float]:
    """Losses of a few steps, placed as the loop places them."""
    with jax.set_mesh(mesh):
        current = state.create(stage.init_params(jax.random.key(0)), optim.optimizer(config.optim, config.steps))
        placement = sharding.state_sharding(mesh, current)
        current = jax.device_put(current, placement)
        step = state.make_step(stage.loss, config.optim, config.steps, config.seed)
        step = jax.jit(step, out_shardings=(placement, sharding.replicated(mesh)))
        batches = [sharding.global_batch(batch, sharding.batch_sharding(mesh)) for batch in batches]
        step = step.lower(current, batches[0]).compile({"xla_backend_optimization_level": 0})  # compiles sooner
        losses = []
        for batch in batches:
            current, values = step(current, batch)
            losses.append(float(values["loss"]))
        return losses


def test_devices_share_the_batch_without_changing_the_numbers(config, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 64)  # so that there is something to shard in so small a network
    config = load_config(config)
    stage = FlowMatchingStage(config)
    iterator = iter(stage.dataset())
    batches = [next(iterator) for _ in range(3)]
    meshes = [sharding.make_mesh(MeshConfig(), jax.devices()[:n]) for n in (1, 2, 8)]
    meshes.append(sharding.make_mesh(MeshConfig(fsdp=2), jax.devices()[:4]))
    one, *others = (losses_on(config, stage, mesh, batches) for mesh in meshes)
    for other in others:
        np.testing.assert_allclose(other, one, rtol=2e-5)
    assert abs(one[0] - one[2]) > 1e-3  # so the tolerance above says something
    with pytest.raises(UserError, match="fsdp=3 needs 6 devices; this run has 8"):
        sharding.make_mesh(MeshConfig(fsdp=3))


def test_the_stage_refuses_data_that_do_not_belong_together(root, config):
    def build(*overrides):
        return FlowMatchingStage(load_config(config, overrides))

    with pytest.raises(UserError, match=r"no complete set of latents"):
        build("data.sources.0.path=nowhere")
    with pytest.raises(UserError, match=r"nowhere.safetensors does not exist"):
        build("vae=nowhere.safetensors")
    with pytest.raises(UserError, match=r"config.model.vae is "):
        build("model.vae.width=8")
    with pytest.raises(UserError, match=r"text_dim is 32, but the data have text states of width 384"):
        build("model.unet.text_dim=32")
    other = tiny.write_vae(root / "other.safetensors")
    for shards in ("t2i", "edit"):
        info = root / shards / "info.json"
        before = info.read_text()
        info.write_text(json.dumps(json.loads(before) | {"vae": to_dict(tiny.CONFIG.vae) | {"width": 8}}))
        with pytest.raises(UserError, match=f"{shards} holds latents of another autoencoder"):
            build(f"vae={other}")
        info.write_text(before)


def test_conditions_are_dropped_as_often_as_asked(config):
    """With every text and image dropped, prompts and sources do not matter; with none dropped they do."""
    settings = load_config(config)
    batch = next(iter(FlowMatchingStage(settings).dataset()))
    changed = {**batch, "text": batch["text"] + 1.0, "source": batch["source"] + batch["editing"][:, None, None, None]}
    params = tiny.unet_params()
    for drop, equal in ((1.0, True), (0.0, False)):
        stage = FlowMatchingStage(load_config(config, [f"flow.text_drop={drop}", f"flow.image_drop={drop}"]))
        loss = jax.jit(stage.loss)
        a, b = (float(loss(params, x, jax.random.key(0))[0]) for x in (batch, changed))
        assert (a == b) == equal


def test_the_loss_is_the_weighted_error_of_the_target_panel(config):
    """Against its formula, with a U-Net whose last layer is zero: the prediction is 0, so the error is the target's."""
    stage = FlowMatchingStage(load_config(config))
    batch = next(iter(stage.dataset()))
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


def test_grids_show_results_beside_the_truth(config):
    stage = FlowMatchingStage(load_config(config))
    picture = stage.grid(jax.device_get(tiny.unet_params()))
    assert picture.dtype == np.uint8 and picture.shape[1] == 52 + 2 * 132  # two items and the rows' names
    assert loop.check(load_config(config), stage)  # and building shapes afterwards still works
