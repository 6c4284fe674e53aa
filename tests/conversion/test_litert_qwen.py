"""A model with Qwen3-VL's text tower, converted whole: the same picture from the same words."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from conversion import to_litert
from conversion.runtime import Runtime
from dreamlite_jax import load_model, pictures
from dreamlite_jax.errors import UserError

PROMPT = "a red car"
LENGTH = 40


@pytest.fixture(scope="module")
def converted(released, tmp_path_factory):
    """(model folder, its LiteRT folder)."""
    model, output = released[2], tmp_path_factory.mktemp("litert") / "qwen"
    flags = ["--height", "32", "--width", "32", "--text_length", str(LENGTH), "--target", "cpu"]
    assert to_litert.main(["--model", str(model), "--output", str(output), *flags]) == 0
    return model, output


def test_every_component_and_the_picture_keep_their_numbers(converted):
    report = json.loads((converted[1] / "report.json").read_text())
    assert set(report["components"]) == {"unet", "vae_encoder", "vae_decoder", "text"}
    assert report["components"]["text"]["parity"]["max_abs"] <= 2e-5 * report["components"]["text"]["parity"]["peak"]
    assert report["picture"]["psnr_db"] >= 60


def test_words_become_the_same_states(converted):
    """The runtime's own chat and tokenizer beside those of the model's encoder."""
    model, folder = converted
    states, mask = load_model(model, text_dtype=jnp.float32).encode_prompts([PROMPT])
    found, bias = Runtime(folder, threads=1).encode_prompt("generate", PROMPT)
    count = int(mask.sum())
    assert (bias == 0).sum() == count
    assert np.abs(found[0, :count]).max() > 0.1
    assert np.abs(found[0, :count] - states[0, :count]).max() <= 2e-5 * np.abs(found).max()
    assert not found[0, count:].any()


def test_an_edit_is_refused_because_the_encoder_would_have_to_see(converted):
    with pytest.raises(UserError, match="without a picture"):
        Runtime(converted[1], threads=1).generate("make it blue", Image.new("RGB", (8, 8)))


def test_the_same_picture_as_the_model(converted):
    model, folder = converted
    wanted = load_model(model, text_dtype=jnp.float32).generate([PROMPT], seeds=[3], width=32, height=32)[0]
    found = np.clip(Runtime(folder, threads=1).generate(PROMPT, seed=3), -1, 1)
    assert pictures.psnr(wanted, found) >= 60
