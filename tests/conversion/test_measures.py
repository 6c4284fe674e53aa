"""The commands that time and score converted files."""

import json
from pathlib import Path

import numpy as np
import pytest

from conversion import latency, npu, score
from dreamlite_jax.errors import UserError
from dreamlite_jax.evals import sprites


def test_latency_prints_its_protocol_and_the_median(litert_model, tmp_path, capsys):
    output = tmp_path / "latency.json"
    flags = ["--run", f"ours={litert_model}", "--calls", "3", "--threads", "1", "--sample", "1", "4", "8", "4"]
    assert latency.main([*flags, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "canvas [1, 4, 8, 4]" in printed and "1 threads" in printed and "median of 3" in printed
    row = json.loads(output.read_text())["runs"]["ours"]
    assert len(row["seconds"]) == 3 and min(row["seconds"]) <= row["median"] <= max(row["seconds"])
    assert row["kind"] == "litert" and row["peak_memory_bytes"] > 0


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--run", "ours"], "NAME=DIR"),
        (["--run", "ours=/nowhere"], r"unet\.tflite"),
        (["--run", "ours={}", "--calls", "0"], "--calls is 0"),
        (["--run", "ours={}"], r"its canvas is \[1, 4, 8, 4\]"),
    ],
)
def test_latency_of_what_cannot_be_timed(litert_model, flags, named):
    with pytest.raises(UserError, match=named):
        latency.main([flag.format(litert_model) for flag in flags])


class Scored:
    """Scores as `score.score` gives them, without drawing."""

    def __init__(self, **by_folder):
        self.by_folder = by_folder

    def __call__(self, folder: Path, *_):
        hard = self.by_folder[folder.name]
        scores = {"generate": {"retrieval_random": 1.0, "retrieval_hard": hard}, "edit": {"edit_gain": 0.9}}
        return {"protocol": "made up", "recipe": folder.name, **scores}


@pytest.mark.parametrize("hard, code", [(0.72, 0), (0.70, 1)])
def test_a_score_that_drops_too_far_is_exit_code_one(monkeypatch, tmp_path, hard, code, capsys):
    monkeypatch.setattr(score, "score", Scored(fp32=0.74, int8=hard))
    flags = ["--model", "int8", "--against", "fp32", "--output", str(tmp_path / "score.json")]
    assert score.main(flags) == code
    assert json.loads((tmp_path / "score.json").read_text())["passed"] is (code == 0)
    assert ("DROPPED" in capsys.readouterr().out) == bool(code)


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
