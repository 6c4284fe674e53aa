"""The commands that time and score converted files."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conversion import delegates, latency, npu, resources, score
from dreamlite_jax.errors import UserError
from dreamlite_jax.evals import sprites


def test_latency_prints_its_protocol_and_the_median(litert_model, tmp_path, capsys):
    output = tmp_path / "new" / "latency.json"
    flags = ["--run", f"ours={litert_model}", "--calls", "3", "--threads", "1"]
    assert latency.main([*flags, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert (
        "canvas [1, 4, 8, 4] (NHWC), text length 48" in printed and "1 threads" in printed and "median of 3" in printed
    )
    row = json.loads(output.read_text())["runs"]["ours"]
    assert len(row["seconds"]) == 3 and min(row["seconds"]) <= row["median"] <= max(row["seconds"])
    assert row["kind"] == "litert" and row["peak_memory_bytes"] > 0


def test_latency_says_the_threads_that_it_used(litert_model, monkeypatch, capsys):
    monkeypatch.setattr(resources, "cores", lambda: 1)
    given = []
    row = {"kind": "litert", "median": 1.0, "seconds": [1.0], "first": 1.0, "load": 1.0, "peak_memory_bytes": 1}
    monkeypatch.setattr(latency, "measure_apart", lambda folder, threads, *_: given.append(threads) or row)
    assert latency.main(["--run", f"ours={litert_model}", "--threads", "54321"]) == 0
    printed = capsys.readouterr()
    assert given == [1] and ", 1 threads, " in printed.out
    assert printed.err == "threads is 54321; this process has 1 core: using 1\n"


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--run", "ours"], "NAME=DIR"),
        (["--run", "ours=/nowhere"], r"unet\.tflite"),
        (["--run", "ours={}", "--calls", "0"], "--calls is 0"),
        (["--run", "ours={}", "--sample", "1", "64", "128", "4"], r"ours: its canvas is \[1, 4, 8, 4\]"),
        (["--run", "ours={}", "--text_length", "12"], r"ours: its text length is 48; that of the command line is 12"),
        (["--run", "ours={}", "--run", "ours={}"], "the name ours is taken"),
        (["--run", "torch={torch}"], "give --sample and --text_length"),
        (["--run", "ours={}", "--output", "{torch}/unet/config.json/x"], "json is a file"),
    ],
)
def test_latency_of_what_cannot_be_timed(litert_model, tmp_path, monkeypatch, flags, named):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    monkeypatch.setattr(latency, "measure_apart", None)  # nothing is timed before the message
    with pytest.raises(UserError, match=named):
        latency.main([flag.format(litert_model, torch=tmp_path) for flag in flags])


def test_other_processes_start_in_an_installation_too(litert_model, tmp_path):
    """The folders as setup.cfg maps them, not the checkout: dreamlite_jax/types.py must not hide Python's."""
    root = Path(latency.__file__).parents[1]
    leave_out = shutil.ignore_patterns("assets", "__pycache__")
    shutil.copytree(root / "dreamlite_jax", tmp_path / "dreamlite_jax", ignore=leave_out)
    shutil.copytree(root / "conversion", tmp_path / "dreamlite_jax" / "conversion", ignore=leave_out)
    command = [
        sys.executable,
        "-m",
        "dreamlite_jax.conversion.latency",
        "--run",
        f"ours={litert_model}",
        "--calls",
        "1",
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "ours " in done.stdout


def test_scores_that_cannot_be_made(litert_model, tmp_path):
    (tmp_path / "file").write_text("x")
    for flags, named in (
        (["--threads", "-1"], "threads is -1"),
        (["--output", str(tmp_path)], "is a folder"),
        (["--output", str(tmp_path / "file" / "x.json")], "file is a file"),
    ):
        with pytest.raises(UserError, match=named):
            score.main(["--model", str(litert_model), *flags])


def test_a_chip_that_does_not_exist(litert_model):
    with pytest.raises(UserError, match=r"'NONSENSE' is unknown; it must be one of .*SM8750"):
        delegates.main(["--model", str(litert_model), "--rules", "--npu_soc", "NONSENSE"])


class Scored:
    """Scores as `score.score` gives them, without drawing."""

    def __init__(self, **by_folder):
        self.by_folder = by_folder

    def __call__(self, folder: Path, *_):
        hard = self.by_folder[folder.name]
        scores = {"generate": {"retrieval_random": 1.0, "retrieval_hard": hard}, "edit": {"edit_gain": 0.9}}
        for task, values in scores.items():
            values["floors"] = {"light grey": dict.fromkeys(scores[task], 0.125)}
        return {"protocol": "made up", "recipe": folder.name, **scores}


@pytest.mark.parametrize("hard, code", [(0.72, 0), (0.70, 1)])
def test_a_score_that_drops_too_far_is_exit_code_one(monkeypatch, tmp_path, hard, code, capsys):
    monkeypatch.setattr(score, "score", Scored(fp32=0.74, int8=hard))
    flags = ["--model", "int8", "--against", "fp32", "--output", str(tmp_path / "score.json")]
    assert score.main(flags) == code
    assert json.loads((tmp_path / "score.json").read_text())["passed"] is (code == 0)
    said = capsys.readouterr().out
    assert ("DROPPED" in said) == bool(code)
    assert said.count("without a model: light grey 0.125") == 3  # beside each score


def test_the_benchmark_draws_with_the_converted_files(litert_model):
    model = score.ConvertedModel(litert_model, threads=1)
    images = model.generate(["a red car", "a dog"], steps=1, width=32, height=32, seeds=[0, 1])
    assert images.shape == (2, 32, 32, 3) and np.abs(images).max() <= 1
    assert "1 Euler steps" in sprites.Protocol("validation", 8, 1).line(model)
    with pytest.raises(UserError, match=r"64x64, these files draw 32x32; convert with --width 64"):
        score.score(litert_model, "validation", 8, 1)


def test_without_the_sdk_no_npu_is_asked(monkeypatch, litert_model):
    monkeypatch.setattr(npu, "sdk_folder", lambda: None)
    with pytest.raises(UserError, match="not installed"):
        npu.partition(litert_model / "unet.tflite")


@pytest.mark.skipif(npu.sdk_folder() is None, reason="the libraries of Qualcomm's SDK are not installed")
def test_the_npu_takes_the_unet_in_one_partition(litert_model):
    taken, count, partitions = npu.partition(litert_model / "unet.tflite")
    assert taken == count > 100 and partitions == 1
