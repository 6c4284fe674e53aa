"""What befalls a run on a real machine, signals, a full disk, damaged checkpoints: never a wrong result."""

import re
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from runs import Mishap, finish, full_disk_at_step_7, rows, saved_steps, start, weights

from dreamlite_jax import exit_codes, train
from dreamlite_jax.errors import UserError
from dreamlite_jax.parallel import sharding
from dreamlite_jax.training import checkpoint, fingerprint
from dreamlite_jax.training.build import build
from dreamlite_jax.training.config import load_config

STRUCK = (-signal.SIGKILL, exit_codes.PREEMPTED, 0)


def strike_until_done(config: str, workdir: Path, mishaps: int, flags: tuple[str, ...] = ()) -> list[int]:
    """Exit codes of a run that is struck so often, started again each time, and then left in peace."""
    codes = []
    for seed in range(4, 4 + mishaps):  # 4 kills, 5 asks to stop, …
        codes.append(finish(start(config, workdir, Mishap(seed, 3), flags), workdir, STRUCK))
        if codes[-1] == 0:
            break
    if codes[-1]:
        finish(start(config, workdir, flags=flags), workdir)
    return codes


def test_struck_at_random_moments_it_ends_with_the_same_bits(run_root, run_config, whole):
    workdir = run_root / "struck"
    codes = strike_until_done(run_config, workdir, mishaps=2)
    assert codes == [-signal.SIGKILL, exit_codes.PREEMPTED]
    assert weights(workdir) == weights(whole) and rows(workdir) == rows(whole)
    log = workdir.with_suffix(".log").read_text()
    stopped = [int(step) for step in re.findall(r"stopped as asked, after step (\d+)", log)]
    assert stopped and all(f"resumed from step {step}\n" in log for step in stopped)  # nothing is done twice


@pytest.mark.slow
def test_struck_twenty_times_it_ends_with_the_same_bits(run_root, run_config):
    """Saves follow each other so closely that most signals come during one."""
    flags = ("--config.steps=100", "--config.checkpoint_every=2")
    finish(start(run_config, run_root / "long", flags=flags), run_root / "long")
    workdir = run_root / "struck20"
    codes = strike_until_done(run_config, workdir, 20, flags)
    assert len(codes) == 20 and codes.count(-signal.SIGKILL) >= 5 and codes.count(exit_codes.PREEMPTED) >= 5
    assert weights(workdir) == weights(run_root / "long") and rows(workdir) == rows(run_root / "long")
    assert [row["step"] for row in rows(workdir)] == list(range(1, 101))


def test_a_full_disk_during_a_save_is_said_and_loses_nothing(run_root, run_config, whole):
    workdir = run_root / "full"
    finish(start(run_config, workdir, full_disk_at_step_7), workdir, codes=(1,))
    said = r"SaveError: the checkpoint of step 8 was not written \(.*\); the checkpoint of step 4 is kept"
    log = workdir.with_suffix(".log").read_text()
    assert re.search(said, log) and "Event loop is closed" not in log  # nor is it lost among a thousand tracebacks
    assert saved_steps(workdir) == ["4"] and not (workdir / "model").exists()
    finish(start(run_config, workdir), workdir)
    assert weights(workdir) == weights(whole) and rows(workdir) == rows(whole)


# --- damaged checkpoints


def largest_of_arrays(folder: Path) -> Path:
    return max(folder.glob("state/d/*"), key=lambda path: path.stat().st_size)


def flip_a_bit(folder: Path) -> None:
    largest = largest_of_arrays(folder)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)


def cut_a_file(folder: Path) -> None:
    largest = largest_of_arrays(folder)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def swap_arrays(folder: Path) -> None:
    """Every file is as it was written, but of another step: the fingerprint alone can tell."""
    shutil.rmtree(folder / "state")
    shutil.copytree(folder.parent / "8" / "state", folder / "state")


def lose_arrays(folder: Path) -> None:
    shutil.rmtree(folder / "state")


def garble_the_record(folder: Path) -> None:
    next(path for path in (folder / "meta").rglob("metadata")).write_text('{"config": ')


def empty_it(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.fixture(scope="module")
def shapes(run_config):
    return build(load_config(run_config)).stage.state_shapes()


def restore(workdir: Path, shapes):
    mesh = sharding.make_mesh(load_config(str(workdir.parent / "config.py")).mesh)
    checkpoints = checkpoint.Checkpoints(workdir, keep=2)
    try:
        return checkpoints.restore(shapes, sharding.state_sharding(mesh, shapes))
    finally:
        checkpoints.close()


@pytest.mark.parametrize("damage", [flip_a_bit, cut_a_file, swap_arrays, lose_arrays, garble_the_record, empty_it])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(damage, whole, run_root, shapes, capsys):
    workdir = run_root / damage.__name__
    shutil.copytree(whole / "checkpoints", workdir / "checkpoints")
    damage(workdir / "checkpoints" / "12")
    restored = restore(workdir, shapes)
    assert restored.step == 8 and int(restored.state.step) == 8
    assert restored.meta["config"]["steps"] == 12 and restored.meta["clock"]["train"] > 0
    said = capsys.readouterr().err
    assert "the checkpoint of step 12 is damaged" in said and f"{workdir}/damaged" in said
    assert saved_steps(workdir) == ["8"] and (workdir / "damaged" / "step_12").is_dir()
    if damage is swap_arrays:
        assert "the arrays of" in said and "are not those that were saved" in said
    empty_it(workdir / "checkpoints" / "8")
    for _ in range(2):  # nor does the next start begin anew
        with pytest.raises(UserError, match=r"no checkpoint that is whole; .*/damaged: step_12, step_8\. Use another"):
            restore(workdir, shapes)
    assert not saved_steps(workdir)


def nothing_answers(folder: Path) -> str:
    """Reading raises what a mount does that lost its storage: EIO (this file does at its first byte)."""
    file = next(path for path in (folder / "meta").rglob("metadata"))
    file.unlink()
    file.symlink_to("/proc/self/mem")
    return "Input/output error"


def arrays_cannot_be_opened(folder: Path) -> str:
    """By a loop of links. TensorStore has ValueError for this as for damage."""
    array = largest_of_arrays(folder)
    array.unlink()
    array.symlink_to(array)
    return "Too many levels of symbolic links"


@pytest.mark.parametrize("fault", [nothing_answers, arrays_cannot_be_opened])
def test_what_storage_is_at_fault_for_sets_no_checkpoint_aside(fault, whole, run_root, shapes):
    workdir = run_root / fault.__name__
    shutil.copytree(whole / "checkpoints", workdir / "checkpoints")
    with pytest.raises((OSError, ValueError), match=fault(workdir / "checkpoints" / "12")):
        restore(workdir, shapes)
    assert saved_steps(workdir) == ["12", "8"] and not (workdir / "damaged").exists()


@pytest.mark.parametrize(
    ("error", "damage"),
    [
        (FileNotFoundError(2, "No such file or directory"), True),
        (ValueError("DATA_LOSS: CRC-32C checksum verification failed"), True),
        (ValueError("NOT_FOUND: Error reading d/1 [os_error_code='2']"), True),
        (KeyError("state"), True),
        (OSError(5, "Input/output error"), False),
        (TimeoutError("storage"), False),
        (MemoryError(), False),
        (ValueError("UNAVAILABLE: storage"), False),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), False),
        (ValueError("FAILED_PRECONDITION: Error reading d/1: Not connected [os_error_code='107']"), False),
        (UserError("other arrays"), False),
    ],
)
def test_damage_is_told_from_a_bad_moment(error, damage):
    assert checkpoint.is_damage(error) == damage
    wrapped = RuntimeError("while restoring")
    wrapped.__cause__ = error
    assert checkpoint.is_damage(wrapped) == damage


@pytest.mark.slow
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(run_root, run_config, whole):
    workdir = run_root / "flipped"
    shutil.copytree(whole, workdir)
    shutil.rmtree(workdir / "model")
    flip_a_bit(workdir / "checkpoints" / "12")
    finish(start(run_config, workdir), workdir)
    assert "resumed from step 8" in workdir.with_suffix(".log").read_text()
    assert weights(workdir) == weights(whole) and rows(workdir) == rows(whole)


def test_another_stage_or_another_optimiser_is_not_mistaken_for_damage(run_root, run_config, whole, shapes):
    workdir = run_root / "another"
    shutil.copytree(whole / "checkpoints", workdir / "checkpoints")
    with pytest.raises(UserError, match=r"checkpoints of stage flow_matching, and config.stage is vae"):
        checkpoint.check_resume(workdir, {**checkpoint.saved_config(workdir), "stage": "vae"})
    with pytest.raises(UserError, match=r"whose opt_state has other arrays than this config makes"):
        restore(workdir, shapes.replace(opt_state=shapes.params))
    assert saved_steps(workdir) == ["12", "8"]


def test_a_stage_starts_from_a_run_that_has_not_exported_yet(run_root, run_config, whole, shapes):
    workdir = run_root / "unexported"
    shutil.copytree(whole / "checkpoints", workdir / "checkpoints")
    stage = build(load_config(run_config, [f"init_from={workdir}"])).stage
    started, saved = stage.init_state().params, restore(workdir, shapes).state
    assert jax.tree.all(jax.tree.map(np.array_equal, started, jax.device_get(saved.ema)))
    assert not jax.tree.all(jax.tree.map(np.array_equal, started, jax.device_get(saved.params)))
    other = build(load_config(run_config, [f"init_from={workdir}", "model.unet.ff_mult=2"])).stage
    with pytest.raises(UserError, match="U-Net of another architecture"):
        other.init_state()
    flip_a_bit(workdir / "checkpoints" / "12")
    with pytest.raises(UserError, match=r"the checkpoint of step 12 in .* cannot be used"):
        stage.init_state()


def test_a_fingerprint_sees_every_bit_and_no_mesh():
    rng = np.random.default_rng(0)
    state = {"params": {"a": rng.normal(size=(64, 24)).astype(np.float32), "b": np.arange(5, dtype=np.int32)}}
    mesh = sharding.make_mesh(load_config("configs/quickstart.py:t2i").mesh)
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))

    def number(a) -> int:
        return int(fingerprint.fingerprint({"params": {**state["params"], "a": a}})["params"])

    one = number(state["params"]["a"])
    assert number(jax.device_put(state["params"]["a"], spread)) == one
    for row, bit in ((0, 0), (13, 31), (63, 7)):
        changed = state["params"]["a"].copy()
        changed.view(np.uint32)[row, 3] ^= np.uint32(1 << bit)
        assert number(changed) != one
    assert number(state["params"]["a"][::-1].copy()) != one  # the same words in other places


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("mesh.fsdp=0", "config.mesh.fsdp is 0; it must be at least 1"),
        ("mesh.data=-1", "config.mesh.data is -1"),
        ("mesh.fsdp=3", "mesh data=2 x fsdp=3 needs 6 devices; this run has 8"),
        ("mesh.data=4", "mesh data=4 x fsdp=1 needs 4 devices; this run has 8"),
        ("accumulate=0", "config.accumulate is 0; it must be at least 1"),
        ("accumulate=3", "config.data.batch_size is 8; it must be a multiple of accumulate 3"),
        ("accumulate=2", "config.data.batch_size 8 is not a multiple of 8 devices x config.accumulate 2; 16 would be"),
        ("data.batch_size=12", "config.data.batch_size 12 is not a multiple of 8 devices"),
        ("profile_steps=-1", "config.profile_steps is -1"),
    ],
)
def test_what_does_not_fit_the_devices_is_said_first(run_root, run_config, override, says):
    with pytest.raises(UserError, match=re.escape(says)):
        train.main(["--config", run_config, "--workdir", str(run_root / "never"), f"--config.{override}"])
    assert not list((run_root / "never").glob("*"))


def test_only_a_mean_over_items_accumulates(tmp_path):
    location = tiny.write_config(tmp_path / "c.py", tiny.train_config(tmp_path, stage="vae", accumulate=2))
    with pytest.raises(UserError, match="the loss of stage vae is not a mean over items"):
        load_config(str(location))
