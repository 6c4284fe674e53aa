"""Of two starts in one workdir the second is refused, whatever the first is doing; a dead run holds nothing."""

import json
import os
import threading
import time
from pathlib import Path

import pytest
from runs import PROCESSES, at_step, die, finish, rows, saved_steps, start, wait_for_save, weights

from dreamlite_jax import train
from dreamlite_jax.errors import UserError
from dreamlite_jax.training import claim


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(claim, "BEAT", 0.05)
    monkeypatch.setattr(claim, "SILENCE", 0.5)
    monkeypatch.setattr(claim, "UNREADABLE", 0.2)


def written(workdir: Path, **changes) -> Path:
    """A claim as another process would have left it."""
    path = workdir / claim.NAME
    path.write_text(
        json.dumps({"token": "theirs", **claim.this_process(), "began": "before", "time": time.time(), **changes})
    )
    return path


def waits_at_steps_2_and_10(workdir: Path) -> None:
    """Until the test has made a file of that name."""

    def until(name: str):
        while not workdir.with_name(name).exists():
            time.sleep(0.02)

    at_step(2, lambda: until("on_2"))
    at_step(10, lambda: until("on_10"))


def test_a_second_start_is_refused_and_changes_nothing(run_root, run_config, whole):
    workdir = run_root / "twice"
    first = start(run_config, workdir, waits_at_steps_2_and_10)
    for name, saved in (("on_2", 0), ("on_10", 8)):
        while not (workdir / claim.NAME).exists():
            time.sleep(0.02)
        if saved:
            wait_for_save(workdir, saved)
        with pytest.raises(UserError, match=rf"{workdir} is in use by process {first.pid} on \S+, begun 20.*another"):
            train.main(["--config", run_config, "--workdir", str(workdir)])
        workdir.with_name(name).touch()
    finish(first, workdir)
    assert weights(workdir) == weights(whole) and rows(workdir) == rows(whole)
    assert saved_steps(workdir) == saved_steps(whole) and not (workdir / claim.NAME).exists()


def test_a_killed_run_holds_nothing(run_root, run_config, capsys):
    workdir = run_root / "killed"
    finish(start(run_config, workdir, die_at_step_3), workdir, codes=(-9,))
    assert (workdir / claim.NAME).exists()
    with claim.Claim(workdir):
        assert "which lives no more: this run takes it over" in capsys.readouterr().err


def die_at_step_3(_: Path) -> None:
    at_step(3, die)


@pytest.mark.parametrize(
    "changes",
    [
        {"pid": 2**22 + 1},
        {"started": "1"},
        {"machine": "elsewhere"},
        {"boot": "before the last"},
        {"namespace": "pid:[1]"},
        {"machine": "elsewhere", "time": 0.0},
    ],
)
def test_a_claim_without_a_sign_of_life_is_taken_over(tmp_path, capsys, changes):
    written(tmp_path, **changes)
    with claim.Claim(tmp_path):
        assert claim.read(tmp_path / claim.NAME)["pid"] == os.getpid()
    said = capsys.readouterr().err
    assert "this run takes it over" in said and ("watching" in said) == (not {"pid", "started", "time"} & {*changes})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("changes", [{"machine": "elsewhere"}, {"namespace": "pid:[1]"}])
def test_a_claim_of_another_machine_that_beats_is_respected(tmp_path, changes):
    beats = iter(range(100))
    written(tmp_path, **changes)
    beating = threading.Timer(0.2, lambda: written(tmp_path, **changes, beats=next(beats)))
    beating.start()
    with pytest.raises(UserError, match="is in use by process"), claim.Claim(tmp_path):
        pass
    beating.join()
    assert claim.read(tmp_path / claim.NAME)["token"] == "theirs"


def test_a_claim_of_another_machine_that_ends_while_it_is_watched_is_free(tmp_path):
    path = written(tmp_path, machine="elsewhere")
    ending = threading.Timer(0.2, path.unlink)
    ending.start()
    with claim.Claim(tmp_path) as own:
        own.check()
    ending.join()


@pytest.mark.parametrize("text", ["", '{"token": "th', "[]", "\0\0\0\0"])
def test_a_torn_claim_holds_nothing(tmp_path, text):
    (tmp_path / claim.NAME).write_text(text)
    with claim.Claim(tmp_path) as own:
        own.check()
    assert not list(tmp_path.iterdir())


def test_a_run_that_lost_its_workdir_writes_nothing_more(tmp_path):
    with claim.Claim(tmp_path) as own:
        own.check()
        written(tmp_path, machine="elsewhere")
        deadline = time.monotonic() + 5
        with pytest.raises(UserError, match=r"was taken over by process .* on elsewhere"):
            while time.monotonic() < deadline:
                own.check()
    assert claim.read(tmp_path / claim.NAME)["token"] == "theirs"


def race(workdir: Path, at: float, results) -> None:
    time.sleep(max(0, at - time.time()))
    try:
        with claim.Claim(workdir):
            results.put("mine")
            time.sleep(1)
    except UserError as error:
        results.put("refused" if "in use by" in str(error) else str(error))


def test_of_many_that_take_over_one_wins(tmp_path):
    written(tmp_path, started="1")
    results, at = PROCESSES.Queue(), time.time() + 3
    racers = [PROCESSES.Process(target=race, args=(tmp_path, at, results)) for _ in range(5)]
    for racer in racers:
        racer.start()
    assert sorted(results.get() for _ in racers) == ["mine", *["refused"] * 4]
    for racer in racers:
        racer.join()
