"""A model with Qwen3-VL's text tower, converted whole: the same picture from the same words."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from conversion import quantize, runtime, states, to_litert, to_onnx
from conversion.graph import COMPONENTS
from conversion.runtime import Runtime
from dreamlite_jax import load_model, pictures
from dreamlite_jax.errors import UserError

PROMPT = "a red car"
LENGTH = 300  # an edit's picture alone has 258 states; a prompt without a picture at most 200


@pytest.fixture(scope="module")
def converted(released, tmp_path_factory):
    """(model folder, its LiteRT folder)."""
    model, output = released[2], tmp_path_factory.mktemp("litert") / "qwen"
    flags = ["--height", "32", "--width", "32", "--text_length", str(LENGTH), "--target", "cpu"]
    assert to_litert.main(["--model", str(model), "--output", str(output), *flags]) == 0
    return model, output


@pytest.fixture(scope="module")
def jax_model(converted):
    return load_model(converted[0], text_dtype=jnp.float32)


def test_every_component_and_the_picture_keep_their_numbers(converted):
    report = json.loads((converted[1] / "report.json").read_text())
    assert set(report["components"]) == {"unet", "vae_encoder", "vae_decoder", "text"}
    assert report["components"]["text"]["parity"]["max_abs"] <= 2e-5 * report["components"]["text"]["parity"]["peak"]
    assert report["picture"]["psnr_db"] >= 60


@pytest.mark.parametrize("words", [3, 185, 192])
def test_words_become_the_same_states(converted, jax_model, words):
    """The runtime's own chat and tokenizer beside those of the model's encoder.

    Above 195 tokens, five of them the tag's, the pipeline cuts the template's closing words, silently.
    """
    prompt = " ".join(["car"] * words)
    states, mask = jax_model.encode_prompts([prompt])
    runtime = Runtime(converted[1], threads=1)
    found, bias = runtime.encode_prompt("generate", prompt)
    count = int(mask.sum())
    assert (bias == 0).sum() == count and (count == 200) == (words == 192)
    assert np.abs(found[0, :count]).max() > 0.02  # no norm has scaled them
    assert np.abs(found[0, :count] - states[0, :count]).max() <= 2e-5 * np.abs(found).max()
    assert found.shape[1] == LENGTH and not found[0, count:].any()
    with pytest.raises(UserError, match="the limit is 200"):
        runtime.encode_prompt("generate", "car " * 200)


def test_an_edit_is_refused_because_the_encoder_would_have_to_see(converted):
    with pytest.raises(UserError, match=r"without a picture.*conversion\.states"):
        Runtime(converted[1], threads=1).generate("make it blue", Image.new("RGB", (8, 8)))


def test_a_sampler_visits_every_component_without_editing(converted):
    """What quantising and `conversion.half` look at."""
    visited = quantize.visit(converted[1], prompts=[PROMPT], steps=1)
    assert set(visited) == set(COMPONENTS)
    assert len(visited["vae_encoder"].inputs) == 1


def test_an_edit_with_states_that_were_computed_elsewhere(converted, tmp_path):
    """The same picture as the JAX pipeline's, from files without a text encoder."""
    model, folder = converted
    source, file, output = tmp_path / "source.png", tmp_path / "states.npz", tmp_path / "drawn.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(source)
    flags = ["--prompt", PROMPT, "--image", str(source), "--litert", str(folder), "--output", str(file)]
    assert states.main(["--model", str(model), *flags]) == 0

    alone = shutil.copytree(folder, tmp_path / "alone")
    manifest = json.loads((alone / "model.json").read_text())
    for part in ("chat", "pad_id"):
        del manifest[part]
    (alone / manifest["files"].pop("text")).unlink()
    (alone / "tokenizer.json").unlink()
    (alone / "model.json").write_text(json.dumps(manifest))
    guided = ["--guidance_scale", "3", "--image_guidance_scale", "1.5", "--seed", "5"]
    drawing = ["--model", str(alone), "--states", str(file), "--output", str(output), *guided]
    assert runtime.main([*drawing, "--image", str(source)]) == 0
    options = dict(guidance_scale=3.0, image_guidance_scale=1.5, seeds=[5], width=32, height=32)
    wanted = load_model(model).generate([PROMPT], images=[pictures.read_picture(source)], **options)[0]
    found = np.asarray(Image.open(output), np.float32) / 127.5 - 1
    assert pictures.psnr(wanted, found) >= 45  # of 8 bits

    with pytest.raises(UserError, match="--image goes with edit"):
        runtime.main(drawing)
    with pytest.raises(UserError, match=r"has no text; compute its states with python -m conversion\.states"):
        Runtime(alone, threads=1).encode_prompt("generate", PROMPT)


def test_states_that_do_not_fit(converted, tmp_path):
    model, folder = converted
    short = shutil.copytree(folder, tmp_path / "short")
    manifest = json.loads((short / "model.json").read_text())
    manifest["sizes"]["text_length"] = 4
    (short / "model.json").write_text(json.dumps(manifest))
    flags = ["--model", str(model), "--prompt", PROMPT, "--litert", str(short), "--output", str(tmp_path / "s.npz")]
    with pytest.raises(UserError, match=r"the limit is .*converted with --text_length 4"):
        states.main(flags)
    np.savez(tmp_path / "other.npz", task="generate")
    for path, named in ((tmp_path / "none.npz", "does not exist"), (tmp_path / "other.npz", "is not a file of")):
        with pytest.raises(UserError, match=named):
            Runtime(folder, threads=1).read_states(path)


def test_the_tower_as_onnx(converted, tmp_path):
    flags = ["--component", "text", "--text_length", "20", "--height", "32", "--width", "32"]
    assert to_onnx.main(["--model", str(converted[0]), "--output", str(tmp_path / "onnx"), *flags]) == 0
    assert "limit" in json.loads((tmp_path / "onnx" / "model.json").read_text())["chat"]


def test_the_same_picture_as_the_model(converted, jax_model):
    wanted = jax_model.generate([PROMPT], seeds=[3], width=32, height=32)[0]
    found = np.clip(Runtime(converted[1], threads=1).generate(PROMPT, seed=3), -1, 1)
    assert pictures.psnr(wanted, found) >= 60
