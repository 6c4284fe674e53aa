"""The last page of the quick start: it says what the steps left, and fails when a number is below its floor."""

import json

import numpy as np
import pytest
from PIL import Image

from dreamlite_jax.evals import quickstart

GOOD = {
    "generate": {"retrieval_random": 0.95, "retrieval_hard": 0.7, "mse": 0.01, "reward": -0.8},
    "edit": {"edit_gain": 0.96, "objects_made": 0.9, "objects_kept": 0.8, "unchanged_psnr": 23.0, "reward": -1.1},
}
FLOORS = {"light grey": {"edit_gain": 0.715}, "untouched": {"edit_gain": 0.0}}
SPREAD = 0.004  # between draws


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture
def work(tmp_path):
    """What the steps of a quick start leave, without the models; `full` adds those of --full."""

    def make(full=False):
        stages = [*quickstart.STAGES, *(quickstart.POST_STAGES if full else ())]
        for name in ("install", "data", "latents_t2i", "eval_joint", "sample", *stages):
            (tmp_path / "steps").mkdir(exist_ok=True)
            (tmp_path / "steps" / name).write_text("60")
        for name in [*stages, *(("teacher", "undistilled") if full else ())]:
            lower = {"undistilled": 0.3, "sft": 0.05}.get(name, 0.0)
            scores = {task: {k: v - lower for k, v in values.items()} for task, values in GOOD.items()}
            scores["edit"]["floors"] = FLOORS
            splits = ("validation", "heldout")
            if name not in quickstart.STAGES:
                splits = ("heldout",)
                for task, values in scores.items():
                    values["spread"] = dict.fromkeys(GOOD[task], SPREAD)
            write(tmp_path / "evals" / name / "report.json", {s: {"protocol": "200 items", **scores} for s in splits})
        for i, name in enumerate(stages):
            clock = {"train": 100.0, "compile": 10.0, "pause": 10.0}
            write(tmp_path / name / "model" / "model.json", {"provenance": {"steps": 100 + i, "clock": clock}})
        home = tmp_path / "student" if full else tmp_path
        write(home / "litert" / "report.json", {"components": {}})
        (home / "pictures").mkdir()
        for name in ("made", "edited"):
            picture = np.zeros((8, 8, 3), np.uint8)
            Image.fromarray(picture).save(home / "pictures" / f"{name}.png")
            picture[0, 0] = 3  # 9/64 levels squared: 56.6 dB
            Image.fromarray(picture).save(home / "pictures" / f"{name}_litert.png")
        return tmp_path

    return make


def spoil(work, name, task, key, value, split="validation"):
    path = work / "evals" / name / "report.json"
    report = json.loads(path.read_text())
    report[split][task][key] = value
    write(path, report)


def test_a_good_run_says_so(work, capsys):
    folder = work()
    assert quickstart.main(["--workdir", str(folder)]) == 0
    report = json.loads((folder / "report.json").read_text())
    assert [s["stage"] for s in report["stages"]] == ["t2i", "edit", "joint"]
    assert report["total_minutes"] == pytest.approx(3 * 2 + 5)  # three stages by their clocks, five other steps
    assert report["runtime_psnr_db"]["made"] == pytest.approx(56.66, abs=0.01)
    assert all(row["holds"] for row in report["checks"])
    printed = capsys.readouterr().out
    assert "| joint | 102 | 2.0 | retrieval 0.95 random, 0.70 hard" in printed
    assert "unchanged 23.0 dB, objects made 0.90, kept 0.80" in printed
    page = (folder / "report.md").read_text()
    assert "evals/joint/edit_heldout.png" in page and f"--model {folder}/joint" in page


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [("retrieval_hard", 0.49, "hard distractors is 0.490"), ("retrieval_random", 0.84, "random distractors is 0.840")],
)
def test_a_number_below_its_floor_fails(work, capsys, key, value, said):
    folder = work()
    spoil(folder, "joint", "generate", key, value)
    assert quickstart.main(["--workdir", str(folder)]) == 1
    assert said in capsys.readouterr().err
    assert "**no**" in (folder / "report.md").read_text()


def test_a_joint_model_far_below_a_specialist_fails(work, capsys):
    folder = work()
    spoil(folder, "t2i", "generate", "retrieval_hard", 0.76)
    assert quickstart.main(["--workdir", str(folder)]) == 1
    assert "joint beside T2I alone, retrieval (hard) is -0.060, least -0.05" in capsys.readouterr().err


def test_a_full_run_holds_the_student_against_its_teacher(work, capsys):
    folder = work(full=True)
    assert quickstart.main(["--workdir", str(folder)]) == 0
    report = json.loads((folder / "report.json").read_text())
    assert [s["stage"] for s in report["stages"]] == [*quickstart.STAGES, *quickstart.POST_STAGES]
    page = (folder / "report.md").read_text()
    assert report["model"].endswith("dmd2") and "evals/dmd2/edit_heldout.png" in page and "joint/" not in page
    assert "| ReFL, 4 unguided steps | 0.650 ± 0.004 |" in page and "| ReFL | 0.950 ± 0.004 |" in page
    spoil(folder, "dmd2", "edit", "edit_gain", 0.8, split="heldout")
    assert quickstart.main(["--workdir", str(folder)]) == 1
    assert "student of four steps over its teacher of 28, edit gain is 0.833" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "task", "key", "value", "said"),
    [
        ("refl", "generate", "reward", -0.85, "reward (mean of both tasks) is 0.025, least 0.03"),
        ("refl", "edit", "reward", -1.16, "reward (mean of both tasks) is 0.020, least 0.03"),
        ("refl", "generate", "retrieval_hard", 0.62, "ReFL beside SFT, retrieval (hard) is -0.030, least -0.02"),
        ("undistilled", "generate", "retrieval_hard", 0.71, "in four unguided steps, retrieval (hard) is -0.010"),
        ("undistilled", "edit", "objects_made", 0.92, "in four unguided steps, objects made is -0.020"),
    ],
)
def test_post_training_must_win_and_not_lose(work, capsys, name, task, key, value, said):
    folder = work(full=True)
    spoil(folder, name, task, key, value, split="heldout")
    assert quickstart.main(["--workdir", str(folder)]) == 1
    assert said in capsys.readouterr().err


def test_a_folder_of_something_else_is_named(tmp_path):
    with pytest.raises(ValueError, match="is no quick start"):
        quickstart.main(["--workdir", str(tmp_path)])


def test_floors_stand_beside_every_edit_gain(work):
    folder = work(full=True)
    report = quickstart.collect(folder)
    said = "(light grey 0.71, untouched 0.00), unchanged"
    stages = [stage["numbers"] for stage in report["stages"]]
    assert f"edit gain 0.96 {said}" in stages[1] and said in quickstart.held_out(report)
    assert sum(said in numbers for numbers in stages) == sum("edit gain" in numbers for numbers in stages)
    assert "Edit gain without a model: light grey 0.715, untouched 0.000." in quickstart.page(report)
    assert "(floors unmeasured)" in quickstart.headline({"validation": GOOD})  # of a report that has none
