"""metrics.jsonl: one line a step, without gap or double over restarts; and the clock."""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from dreamlite_jax.training import clock as c
from dreamlite_jax.training import metrics as m
from dreamlite_jax.training.errors import NonFiniteError


def values(loss):
    return {"loss": jnp.float32(loss), "grad_norm": jnp.float32(2.0)}


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write(folder, start, stop, restored=0):
    metrics = m.Metrics(folder, restored)
    for step in range(start, stop + 1):
        metrics.add(step, values(step / 10))
    means = metrics.flush()
    metrics.close()
    return means


def test_each_step_is_a_line_and_flush_gives_means(tmp_path):
    means = write(tmp_path, 1, 3)
    assert means == pytest.approx({"loss": 0.2, "grad_norm": 2.0})
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3]
    assert [row["loss"] for row in lines(tmp_path)] == pytest.approx([0.1, 0.2, 0.3])
    assert list((tmp_path / "tensorboard").iterdir())


def test_nothing_pending_writes_nothing(tmp_path):
    metrics = m.Metrics(tmp_path, 0)
    assert metrics.flush() == {} and not lines(tmp_path)
    metrics.close()


@pytest.mark.parametrize("cut", ['{"step": 8, "lo', '{"step": 8, "loss": 0.8, "grad_norm": 2.0}\n', ""])
def test_resuming_drops_what_comes_after_the_checkpoint(tmp_path, cut):
    write(tmp_path, 1, 7)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(cut)  # a kill may stop in the middle of a line
    write(tmp_path, 5, 9, restored=4)
    assert [row["step"] for row in lines(tmp_path)] == list(range(1, 10))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_a_fresh_start_in_a_folder_with_metrics_begins_anew(tmp_path):
    write(tmp_path, 1, 3)  # killed before its first checkpoint
    write(tmp_path, 1, 2)
    assert [row["step"] for row in lines(tmp_path)] == [1, 2]


@pytest.mark.parametrize("bad", [{"loss": np.nan}, {"loss": np.inf}, {"grad_norm": np.nan}])
def test_what_is_not_finite_raises_with_its_step(tmp_path, bad):
    metrics = m.Metrics(tmp_path, 0)
    for step, row in enumerate((values(1), values(1) | {k: jnp.float32(v) for k, v in bad.items()}, values(1)), 41):
        metrics.add(step, row)
    with pytest.raises(NonFiniteError, match="step 42") as error:
        metrics.flush()
    assert error.value.step == 42 and [row["step"] for row in lines(tmp_path)] == [41, 42]


def test_the_clock_goes_on_after_a_restart(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(c.time, "monotonic", lambda: now[0])
    clock = c.Clock()
    with clock.compiling():
        now[0] += 3
    now[0] += 20
    clock.trained(10)
    with clock.pausing():
        now[0] += 2
    assert clock.state() == {"train": 20, "compile": 3, "pause": 2} and clock.sec_per_step() == 2.0
    again = c.Clock()
    again.restore(clock.state())
    now[0] += 5
    again.trained(5)
    assert again.state() == {"train": 25, "compile": 3, "pause": 2} and again.sec_per_step() == 1.0


def test_what_compiles_while_steps_run_is_no_training(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(c.time, "monotonic", lambda: now[0])
    clock = c.Clock()
    now[0] += 4
    with clock.compiling():  # a bucket that comes late
        now[0] += 100
    now[0] += 6
    clock.trained(5)
    assert clock.state() == {"train": 10, "compile": 100, "pause": 0}


def test_a_pause_between_two_laps_is_no_training(monkeypatch):
    """Nor is what compiles in it a pause; a save that raises still ends its pause."""
    now = [0.0]
    monkeypatch.setattr(c.time, "monotonic", lambda: now[0])
    clock = c.Clock()
    now[0] += 7
    clock.started()
    now[0] += 4
    with clock.pausing():
        now[0] += 30
        with clock.compiling():
            now[0] += 200
    with pytest.raises(OSError), clock.pausing():
        now[0] += 1000
        raise OSError
    now[0] += 6
    clock.trained(5)
    assert clock.state() == {"train": 10, "compile": 200, "pause": 7 + 30 + 1000} and clock.sec_per_step() == 2.0


def test_utilisation_is_work_by_what_the_chips_could_do(monkeypatch, capsys):
    """Half a second a step of 8 devices; known figures for a TPU, none for a device that is not in the table."""
    now = [0.0]
    monkeypatch.setattr(c.time, "monotonic", lambda: now[0])
    clock = c.Clock()
    now[0] += 5
    clock.trained(10, work=0.4 * 5 * 8 * 197e12)
    monkeypatch.setattr(c.jax, "device_count", lambda: 8)
    for kind, share in (("TPU v5 lite", 0.4), ("TPU v6 lite", 0.4 * 197 / 918), ("Abacus", None)):
        monkeypatch.setattr(c.jax, "devices", lambda kind=kind: [SimpleNamespace(device_kind=kind)])
        assert clock.utilisation() == (share and pytest.approx(share))
        pace = clock.pace(64)
        assert pace["sec_per_step"] == 0.5 and pace["images_per_sec_per_chip"] == 16 and ("mfu" in pace) == bool(share)
        clock.progress(10, 20, 64, {"loss": 1.0})
        assert ("MFU" in capsys.readouterr().err) == bool(share)
    clock.trained(10)  # a stage that counts no work
    assert c.Clock().utilisation() is None


def test_durations_read_well():
    assert [c.duration(s) for s in (0.4, 59.0, 185.0, 7620.0)] == ["0s", "59s", "3m05s", "2h07m"]
