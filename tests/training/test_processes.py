"""One run in two real processes of four devices, over sockets; and the same numbers on any mesh and in any parts."""

import re
import signal

import jax
import numpy as np
import pytest
import tiny
from runs import Mishap, finish_pair, rows, saved_steps, slow_steps_and_a_notice, start_pair, weights

from dreamlite_jax import exit_codes, model_folder
from dreamlite_jax.parallel import sharding
from dreamlite_jax.parallel.config import MeshConfig
from dreamlite_jax.training import checkpoint
from dreamlite_jax.training.build import build
from dreamlite_jax.training.config import load_config

STEPS, COMPARED = 12, 5
FLAGS = ("--config.mesh.fsdp=4",)


@pytest.fixture(scope="module")
def pair_config(run_root):
    """A batch that four microbatches on eight devices divide."""
    mapping = tiny.train_config(run_root, steps=STEPS)
    mapping["data"]["batch_size"] = 32
    mapping["optim"]["learning_rate"] = 1e-3
    return str(tiny.write_config(run_root / "pair.py", mapping))


@pytest.fixture(scope="module")
def pair(run_root, pair_config):
    """Workdir of a run that nobody disturbed: two processes, mesh data 2 x fsdp 4."""
    workdir = run_root / "pair"
    finish_pair(start_pair(pair_config, workdir, flags=FLAGS), workdir)
    return workdir


def test_two_processes_write_what_one_writes(pair):
    assert [row["step"] for row in rows(pair)] == list(range(1, STEPS + 1))
    assert saved_steps(pair) == ["12", "8"]
    assert (pair / "grids" / "step_000012.png").stat().st_size > 1000
    assert model_folder.load_config(pair / "model") == tiny.CONFIG
    log = pair.with_suffix(".log").read_text()
    assert log.count("on 8 device(s) of 2 processes, data 2 x fsdp 4") == 1 and log.count("done: 12 steps") == 1


def losses_on(config: str, overrides: list[str], devices: int) -> list[float]:
    """Losses of the first steps in this process, placed and compiled as the loop does it."""
    settings = load_config(config, overrides)
    stage, feed, _ = build(settings)
    mesh = sharding.make_mesh(settings.mesh, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        placement = sharding.state_sharding(mesh, stage.state_shapes())
        state = sharding.place(stage.init_state(), placement)
        iterator, batches = iter(feed.dataset(stage.fields)), sharding.batch_sharding(mesh)
        batch = sharding.global_batch(next(iterator), batches)
        step = jax.jit(stage.step, donate_argnums=0, out_shardings=(placement, sharding.replicated(mesh)))
        step = step.lower(state, batch).compile({"xla_backend_optimization_level": 0})  # compiles sooner
        losses = []
        for _ in range(COMPARED):
            state, values = step(state, batch)
            losses.append(float(values["loss"]))
            batch = sharding.global_batch(next(iterator), batches)
    return losses


@pytest.mark.parametrize(
    ("overrides", "devices"),
    [
        (["mesh.fsdp=1"], 8),
        (["mesh.fsdp=4", "accumulate=4"], 8),
        pytest.param(["mesh.fsdp=1"], 1, marks=pytest.mark.slow),  # 15 s of compiling each
        pytest.param(["mesh.fsdp=2"], 8, marks=pytest.mark.slow),
        pytest.param(["mesh.fsdp=8"], 8, marks=pytest.mark.slow),
        pytest.param(["mesh.fsdp=1", "accumulate=4"], 8, marks=pytest.mark.slow),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else f"{value} devices",
)
def test_the_numbers_are_those_of_two_processes(pair, pair_config, overrides, devices, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 64)
    expected = [row["loss"] for row in rows(pair)][:COMPARED]
    found = losses_on(pair_config, overrides, devices)
    print(f"{overrides} on {devices}: largest relative difference {np.max(np.abs(np.divide(found, expected) - 1)):.1e}")
    np.testing.assert_allclose(found, expected, rtol=1e-6 if devices > 1 else 5e-6)  # other shapes, other sums
    assert min(abs(np.diff(expected))) > 1e-4  # so the tolerance above says something


@pytest.mark.parametrize(("data", "fsdp"), [(1, 8), (4, 2), (1, 2)])
def test_what_they_saved_is_restored_on_other_meshes_to_the_bit(pair, pair_config, data, fsdp, monkeypatch):
    """Saved on 2 x 4. `restore` itself compares all bits with the fingerprint taken before the save."""
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 64)
    mesh = sharding.make_mesh(MeshConfig(data, fsdp), jax.devices()[: data * fsdp])
    shapes = build(load_config(pair_config)).stage.state_shapes()
    checkpoints = checkpoint.Checkpoints(pair, keep=2)
    restored = checkpoints.restore(shapes, sharding.state_sharding(mesh, shapes))
    checkpoints.close()
    assert restored.step == int(restored.state.step) == STEPS
    leaves = jax.tree.leaves(restored.state.ema)
    assert any(leaf.sharding.spec for leaf in leaves) and all(leaf.sharding.mesh.size == mesh.size for leaf in leaves)
    exported = model_folder.load_params(pair / "model", "unet")
    assert jax.tree.all(jax.tree.map(np.array_equal, jax.device_get(restored.state.ema), exported))


@pytest.mark.slow
def test_killed_and_told_to_stop_they_end_with_the_same_bits(run_root, pair_config, pair):
    """One of the two gets the signal; a notice reaches the other too, and both stop after the same step."""
    workdir = run_root / "pair_struck"
    finish_pair(start_pair(pair_config, workdir, Mishap(4, 6), FLAGS), workdir, (-signal.SIGKILL,))
    code = finish_pair(
        start_pair(pair_config, workdir, slow_steps_and_a_notice, FLAGS), workdir, (exit_codes.PREEMPTED,)
    )
    assert code == exit_codes.PREEMPTED
    log = workdir.with_suffix(".log").read_text()
    (first, second) = re.findall(r"stopped as asked, after step (\d+)", log)
    assert first == second and saved_steps(workdir)[-1:] == [first]
    finish_pair(start_pair(pair_config, workdir, flags=FLAGS), workdir)
    assert f"resumed from step {first}\n" in workdir.with_suffix(".log").read_text()
    assert weights(workdir) == weights(pair) and rows(workdir) == rows(pair)


@pytest.mark.slow
def test_struck_twenty_times_they_end_with_the_same_bits(run_root, pair_config):
    flags = (*FLAGS, "--config.steps=60", "--config.checkpoint_every=2")
    finish_pair(start_pair(pair_config, run_root / "pair_long", flags=flags), run_root / "pair_long")
    workdir, codes = run_root / "pair_struck20", []
    for seed in range(20):
        struck = start_pair(pair_config, workdir, Mishap(seed, 3), flags)
        codes.append(finish_pair(struck, workdir, (-signal.SIGKILL, exit_codes.PREEMPTED, 0)))
        if codes[-1] == 0:
            break
    if codes[-1]:
        finish_pair(start_pair(pair_config, workdir, flags=flags), workdir)
    assert codes.count(-signal.SIGKILL) >= 5
    assert weights(workdir) == weights(run_root / "pair_long") and rows(workdir) == rows(run_root / "pair_long")
