"""Settings that every door writes into its pictures, and sources that no picture may overwrite."""

import hashlib
import json
import os

import numpy as np
import pytest
import tiny
from PIL import Image

import dreamlite_jax
from dreamlite_jax import app, sample, settings
from dreamlite_jax.errors import UserError

LOADING = dreamlite_jax.load_model
KEYS = {
    "task", "prompt", "image", "image_sha256", "steps", "guidance_scale", "image_guidance_scale", "width", "height",
    "model", "seed",
}  # fmt: skip


@pytest.fixture
def root(tmp_path, monkeypatch):
    tiny.write_model(tmp_path / "model")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / "own.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(path):
    with Image.open(path) as image:
        return json.loads(image.text[settings.KEY])


@pytest.fixture
def words(monkeypatch):
    """The tiny model with an encoder of its own."""

    def load(folder, **options):
        model = LOADING(folder, **options)
        model.encoder = tiny.WordEncoder()
        return model

    monkeypatch.setattr(dreamlite_jax, "load_model", load)
    return load


def test_command_and_page_say_the_same_of_the_same_edit(root, words):
    argv = ["--model", "model", "--prompt", "make it red", "--image", "own.png", "--output", "made.png"]
    sample.main([*argv, "--steps", "1"])
    (root / "page").mkdir()
    studio = app.Studio(words("model"), "model", root / "page")
    made, _ = studio.run("make it red", str(root / "own.png"), 16, 16, 1, 2.0, 1.5, 0, 1, editing=True)
    by_command, by_page = written("made.png"), written(made[0][0])
    assert by_command.keys() == by_page.keys() == KEYS
    assert by_command == by_page | {
        name: by_command[name] for name in ("guidance_scale", "image_guidance_scale")
    }  # which the page's sliders set
    assert by_page["task"] == "edit" and by_page["image"] == "own.png"  # its name, not the server's path
    assert by_page["image_sha256"] == hashlib.sha256((root / "own.png").read_bytes()).hexdigest()
    drawn, _ = studio.run("a cat", None, 16, 16, 1, 2.0, 1.5, 0, 1, editing=False)
    about = written(drawn[0][0])
    assert about.keys() == KEYS and (about["task"], about["image"], about["image_sha256"]) == ("generate", None, None)


@pytest.mark.parametrize("output", ["own.png", "./own.png", "sub/../own.png", "symbolic.png", "hard.png", "own_01.png"])
def test_a_source_is_not_overwritten(root, output):
    (root / "sub").mkdir()
    os.symlink("own.png", "symbolic.png")
    os.link("own.png", "hard.png")
    image = "own.png"
    argv = ["--output", output]
    if output == "own_01.png":  # one of several
        os.rename("own.png", "own_01.png")
        image, argv = "own_01.png", ["--output", "own.png", "--num_images", "2"]
    before = (root / image).read_bytes()
    with pytest.raises(UserError, match=rf"--output .* is the picture that --image {image} names; choose another file"):
        sample.main(["--model", "model", "--prompt", "make it red", "--image", image, *argv])
    assert (root / image).read_bytes() == before


def test_other_pictures_are_overwritten_as_before(root):
    Image.new("RGB", (16, 16)).save("other.png")
    settings.check_source_stays(root / "own.png", [root / "other.png", root / "new.png"])
    settings.check_source_stays(None, [root / "own.png"])
