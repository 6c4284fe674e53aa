"""What a run takes that it goes on with, and what it says of it: settings, data, and numbers that are none."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from runs import rows

from dreamlite_jax import train
from dreamlite_jax.data import latents
from dreamlite_jax.errors import UserError
from dreamlite_jax.training import optim
from dreamlite_jax.training.config import load_config
from dreamlite_jax.training.errors import NonFiniteError


def stopped_at(whole: Path, place: Path, step: int) -> Path:
    """A copy of a finished run as it was after this step."""
    shutil.copytree(whole, place)
    shutil.rmtree(place / "model")
    for path in (place / "checkpoints").iterdir():
        if path.name.isdecimal() and int(path.name) > step:
            shutil.rmtree(path)
    return place


def go_on(config: str, workdir: Path, *overrides: str) -> int:
    return train.main(["--config", config, "--workdir", str(workdir), *(f"--config.{x}" for x in overrides)])


def test_other_settings_are_taken_and_said_and_the_place_in_the_data_holds(
    whole, run_config, tmp_path, monkeypatch, capsys
):
    """8 batches of 8, then batches of 16: the samples after the first 64, each once."""
    read = []
    collate = latents.collate
    monkeypatch.setattr(latents, "collate", lambda example, *rest: read.append(example.id) or collate(example, *rest))
    whole_order = order_of(run_config, read, 8 * 8 + 2 * 16)
    workdir = stopped_at(whole, tmp_path / "bigger", 8)
    assert (
        go_on(run_config, workdir, "steps=10", "data.batch_size=16", "optim.learning_rate=0.001", "data.threads=1") == 0
    )
    said = capsys.readouterr().err
    for line in (
        "config.data.batch_size is 16, was 8",
        "config.steps is 10, was 12",
        "learning_rate is 0.001, was 0.01",
    ):
        assert line in said
    used = read[len(whole_order) :]
    assert [row["step"] for row in rows(workdir)] == list(range(1, 11))
    assert sorted(whole_order[64:]) == sorted(used[: 2 * 16])


def order_of(config: str, read: list[str], count: int) -> list[str]:
    """Ids of a run's first samples, in order."""
    data = load_config(config).data
    batches = iter(latents.mixture(data.sources, batch_size=1, text_length=8, seed=0, threads=0))
    while len(read) < count:
        next(batches)
    return list(read)


def test_other_data_are_refused_by_name_or_begun_anew(whole, run_config, run_root, tmp_path, capsys):
    workdir = stopped_at(whole, tmp_path / "other", 8)
    one = [{"path": str(run_root / "t2i")}]
    with pytest.raises(UserError, match=r"config.data.sources has 1 entries, had 2 .*on_change=restart"):
        go_on(run_config, workdir, f"data.sources={one}")
    with pytest.raises(UserError, match=r"config.data.sources\[1\].weight is 3, was 1"):
        go_on(run_config, workdir, "data.sources.1.weight=3")
    with pytest.raises(UserError, match=r"config.seed is 1, was 0"):
        go_on(run_config, workdir, "seed=1")
    before = [path.name for path in (workdir / "checkpoints").iterdir()]
    assert "8" in before and not (workdir / "model").exists()
    capsys.readouterr()
    assert go_on(run_config, workdir, f"data.sources={one}", "data.on_change=restart", "steps=9") == 0
    assert "from the beginning of other data: config.data.sources has 1 entries, had 2" in capsys.readouterr().err


@pytest.mark.parametrize(("field", "record"), [("text", "edit_3"), ("weight", "generate_5")])
def test_a_batch_that_is_not_finite_is_named(field, record, run_config, tmp_path, monkeypatch):
    """Whatever made it so: here it happens after the reader has looked at what is stored."""
    collate = latents.collate

    def spoilt(example, *rest):
        row = collate(example, *rest)
        return row | {field: row[field] * np.nan} if example.id == record else row

    monkeypatch.setattr(latents, "collate", spoilt)
    with pytest.raises(NonFiniteError, match=rf"not finite: {field} in 1 of 8 rows \(\d\). Mend the data") as error:
        go_on(run_config, tmp_path / "work")
    assert "learning rate" not in str(error.value) and 1 <= error.value.step <= 4


def test_a_warmup_that_no_step_leaves_is_said(run_config, whole, tmp_path, capsys):
    for steps, warmup, says in ((12, 12, "0.0092 of the 0.01"), (12, 1000, "0.00011 of the 0.01"), (12, 11, None)):
        config = load_config(run_config, [f"steps={steps}", f"optim.warmup_steps={warmup}"])
        found = optim.warnings(config)
        assert (
            (f"config.optim.warmup_steps is {warmup}, and the run has 12 steps" in found[0] and says in found[0])
            if says
            else not found
        )
        rates = [float(optim.schedule(config.optim, steps)(step)) for step in range(steps)]
        assert (max(rates) < 0.00999) == bool(says)
    late = ["stage=dmd2", "steps=3", "optim.warmup_steps=1", "dmd.fake_updates=2", "dmd.fake={'warmup_steps': 6}"]
    (line,) = optim.warnings(load_config(run_config, late))
    assert "config.dmd.fake.warmup_steps is 6, and the run has 6 updates of the fake score" in line
    workdir = stopped_at(whole, tmp_path / "warm", 8)
    assert go_on(run_config, workdir, "optim.warmup_steps=1000", "steps=9") == 0
    assert "the learning rate never gets beyond 8e-05 of the 0.01 asked for" in capsys.readouterr().err
