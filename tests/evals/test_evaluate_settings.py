"""Scores are made with the sampling settings that the model carries, unless others are asked for."""

import dataclasses
import json

import numpy as np
import pytest
import tiny

import dreamlite_jax
from dreamlite_jax import evaluate


class Model:
    """Answers with noise and notes how it was asked."""

    def __init__(self, **settings):
        self.config = dataclasses.replace(tiny.CONFIG, native_size=64, **settings)
        self.asked = []

    def generate(self, prompts, **options):
        self.asked.append((options["steps"], self.config.guidance_scale, self.config.image_guidance_scale))
        return np.random.default_rng(0).uniform(-1, 1, (len(prompts), 64, 64, 3)).astype(np.float32)


DISTILLED = {"steps": 4, "guidance_scale": 1.0, "image_guidance_scale": 1.0}
BASE = {"steps": 28, "guidance_scale": 3.0, "image_guidance_scale": 1.5}


@pytest.mark.parametrize(
    ("settings", "flags", "used"),
    [
        (DISTILLED, [], (4, 1.0, 1.0)),
        (BASE, [], (12, 3.0, 1.5)),
        (BASE, ["--steps", "28"], (28, 3.0, 1.5)),
        (BASE, ["--steps", "4", "--guidance_scale", "1", "--image_guidance_scale", "1"], (4, 1.0, 1.0)),
        (DISTILLED, ["--steps", "2"], (2, 1.0, 1.0)),
    ],
)
def test_settings_are_the_model_s_own_or_those_given(tmp_path, monkeypatch, settings, flags, used):
    model = Model(**settings)
    monkeypatch.setattr(dreamlite_jax, "load_model", lambda directory: model)
    argv = ["--model", "x", "--benchmark", "sprites", "--items", "8", "--output", str(tmp_path / "scores")]
    assert evaluate.main([*argv, *flags]) == 0
    assert set(model.asked) == {used}
    line = json.loads((tmp_path / "scores" / "report.json").read_text())["validation"]["protocol"]
    assert f"{used[0]} Euler steps, guidance {used[1]} (image {used[2]})" in line
