"""The model that travels with the package: small, of known origin, good, and drawn with one command."""

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreamlite_jax import load_model, model_folder
from dreamlite_jax.assets import DEMO
from dreamlite_jax.data.sprites.render import render
from dreamlite_jax.data.sprites.scenes import Object, Scene, neighbours
from dreamlite_jax.evals.sprites import Protocol, evaluate, nearest
from dreamlite_jax.training.config import load_config

REPOSITORY = Path(__file__).parents[1]
FLOORS = {  # on 200 scenes never trained on; what configs/demo.py was made for
    ("generate", "retrieval_random"): 0.95,
    ("generate", "retrieval_hard"): 0.80,
    ("edit", "edit_gain"): 0.90,
    ("edit", "unchanged_psnr"): 22.0,
}


def test_it_is_small_and_says_how_it_was_made():
    assert sum(file.stat().st_size for file in DEMO.iterdir()) < 5e6
    config, provenance = model_folder.load_config(DEMO), model_folder.load_provenance(DEMO)
    assert (config.steps, config.guidance_scale, config.image_guidance_scale) == (4, 1.0, 1.0)
    made_by = load_config(f"{REPOSITORY}/configs/demo.py:dmd2")
    assert config.unet == made_by.model.unet and config.vae == made_by.model.vae
    recorded = provenance["config"]
    assert (recorded["stage"], recorded["steps"], recorded["seed"]) == ("dmd2", made_by.steps, made_by.seed)
    assert recorded["optim"]["learning_rate"] == made_by.optim.learning_rate
    for scale in ("guidance_scale", "image_guidance_scale"):
        assert recorded["dmd"][scale] == getattr(made_by.dmd, scale)


def test_it_draws_and_edits_what_it_is_asked_to():
    model = load_model(DEMO)
    scores = evaluate(model, Protocol("validation", 200, steps=4), ("generate", "edit"))
    short = {name: scores[name[0]][name[1]] for name, floor in FLOORS.items() if scores[name[0]][name[1]] < floor}
    assert not short, short


@pytest.fixture(scope="module")
def first_picture(tmp_path_factory):
    """The README's first command, and the CPU seconds that it took."""
    path = tmp_path_factory.mktemp("demo") / "car.png"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    prompt = "a red car and a yellow star on a blue background"
    command = [sys.executable, "-m", "dreamlite_jax.sample", "--prompt", prompt, "--output", path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return path, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_the_first_picture_takes_less_than_a_minute_of_two_cores(first_picture):
    assert first_picture[1] < 2 * 60


def test_the_first_picture_shows_a_red_car_and_a_yellow_star(first_picture):
    """It is nearer to that scene than to every scene that differs in one object, colour or place."""
    made = np.asarray(Image.open(first_picture[0]))
    scene = Scene("blue", "plain", (Object("car", "red", "left"), Object("star", "yellow", "right")))
    others = neighbours(scene, np.random.default_rng(0), 7)
    assert nearest(made, render(scene, 64), [render(other, 64) for other in others])
