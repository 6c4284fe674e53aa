"""The runtime without JAX beside the sampler."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from conversion import exports, graph, litert, onnx, onnx_session, resources, runtime, score
from conversion.graph import Sizes
from conversion.runtime import Runtime
from dreamlite_jax import load_model, model_folder, pictures
from dreamlite_jax.diffusion import guidance
from dreamlite_jax.errors import UserError
from dreamlite_jax.models import blocks

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a red car"


@pytest.fixture(scope="module")
def jax_model(small_model):
    return load_model(small_model)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 4), dtype=np.uint8)
    path = tmp_path_factory.mktemp("pictures") / "source.png"
    Image.fromarray(pixels, "RGBA").save(path)
    return path


@pytest.fixture(scope="module")
def rows_of_two(small_model, tmp_path_factory):
    """The same model in graphs of two rows."""
    folder, config = tmp_path_factory.mktemp("litert"), model_folder.load_config(small_model)
    sizes = Sizes(32, 32, 48, batch=2)
    files = {component: f"{component}.tflite" for component in graph.COMPONENTS}
    exports.write_manifest(small_model, config, sizes, files, folder, format=runtime.FORMAT)
    for component, file in files.items():
        params, text = exports.load(component, small_model, config)
        litert.convert(graph.build(component, config, params, sizes, text), folder / file, {})
    return folder


def test_the_same_picture_for_the_same_seed_and_prompt(litert_model, jax_model):
    wanted = jax_model.generate([PROMPT], seeds=[7])[0]
    found = Runtime(litert_model, threads=1).generate(PROMPT, seed=7)
    assert wanted.std() > 0.05
    assert pictures.psnr(wanted, np.clip(found, -1, 1)) >= 60
    other = Runtime(litert_model, threads=1).generate(PROMPT, seed=8)
    assert pictures.psnr(wanted, np.clip(other, -1, 1)) < 40  # negative control


# Three branches of guidance in three calls, or in two with a row to spare.
@pytest.mark.parametrize("folder, guidance_scale", [("litert_model", 1.0), ("litert_model", 3.0), ("rows_of_two", 3.0)])
def test_the_same_edit(request, jax_model, picture, folder, guidance_scale):
    source = pictures.read_picture(picture)
    options = dict(guidance_scale=guidance_scale, image_guidance_scale=1.25, steps=3)
    wanted = jax_model.generate(["make it blue"], images=[source], seeds=[3], **options)[0]
    folder = request.getfixturevalue(folder)
    found = Runtime(folder, threads=1).generate("make it blue", source, seed=3, **options)
    assert pictures.psnr(wanted, np.clip(found, -1, 1)) >= 60


def test_the_command_runs_without_jax(litert_model, picture, tmp_path):
    code = (
        "import sys; from conversion import runtime; code = runtime.main(sys.argv[1:]); "
        "heavy = {'jax', 'flax', 'torch', 'tensorflow', 'litert_converter'} & set(sys.modules); "
        "assert not heavy, heavy; sys.exit(code)"
    )
    output = tmp_path / "out.png"
    flags = ["--model", str(litert_model), "--prompt", PROMPT, "--image", str(picture), "--output", str(output)]
    done = subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "first load: text" in done.stdout and "peak memory" in done.stdout
    assert Image.open(output).size == (32, 32)
    about = json.loads(Image.open(output).text["dreamlite_jax"])
    assert about == {
        "task": "edit", "prompt": PROMPT, "image": str(picture), "steps": 4, "width": 32, "height": 32, "seed": 0,
        "image_sha256": hashlib.sha256(picture.read_bytes()).hexdigest(), "model": str(litert_model),
        "guidance_scale": about["guidance_scale"], "image_guidance_scale": about["image_guidance_scale"],
    }  # fmt: skip


def test_the_source_of_an_edit_is_not_overwritten(litert_model, picture, tmp_path):
    os.link(picture, tmp_path / "same.png")
    edit = ["--model", str(litert_model), "--prompt", PROMPT, "--image", str(picture)]
    for output in (picture, tmp_path / "same.png"):
        with pytest.raises(UserError, match=r"--output .* is the picture that --image .* names"):
            runtime.main([*edit, "--output", str(output)])
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=r"folder.png is a folder; name a file in it"):  # before anything is drawn
        runtime.main(["--model", str(litert_model), "--prompt", PROMPT, "--output", str(tmp_path / "folder.png")])


def test_components_are_released_and_prompts_remembered(litert_model):
    frugal, eager = Runtime(litert_model, threads=1), Runtime(litert_model, threads=1, keep_loaded=True)
    first = frugal.encode_prompt("generate", PROMPT)
    assert frugal.encode_prompt("generate", PROMPT) is first
    assert not frugal._loaded
    eager.encode_prompt("generate", PROMPT)
    assert set(eager._loaded) == {"text"}
    assert frugal.load_seconds.keys() == {"text"}


def test_sinusoid_is_the_networks():
    x = np.float32([0, 0.5, 313.25, 1000])
    np.testing.assert_allclose(runtime.sinusoid(x, 32), np.asarray(blocks.sinusoid(jnp.asarray(x), 32)), atol=2e-4)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_branches_combine_as_in_the_sampler(count):
    velocities = np.random.default_rng(count).standard_normal((count, 1, 2, 3, 4)).astype(np.float32)
    wanted = guidance.combine(jnp.asarray(velocities), 3.5, 1.5)
    np.testing.assert_allclose(runtime.combine(list(velocities), 3.5, 1.5), np.asarray(wanted), atol=2e-6)


@pytest.mark.parametrize(
    "options, named",
    [
        (dict(prompt=" "), "prompt is empty"),
        (dict(prompt="\ud83d"), "its character 1 is no text"),
        (dict(prompt="\u2060"), "nothing can be seen"),
        (dict(prompt="🦋"), "knows none of the prompt's words: '🦋'"),
        (dict(prompt="word " * 60), "the limit is 48"),
        (dict(prompt="x", seed=-1), "seed"),
        (dict(prompt="x", steps=0), "steps"),
        (dict(prompt="x", guidance_scale=np.nan), "guidance_scale is nan; it must be a finite"),
        (dict(prompt="x", image=np.zeros((8, 8, 3), np.float32)), "image has shape"),
    ],
)
def test_bad_input_is_named(litert_model, options, named):
    with pytest.raises(UserError, match=named):
        Runtime(litert_model, threads=1).generate(**options)


# Our own guard is under test: the kernels themselves, given such numbers, end the process.
@pytest.mark.parametrize("asked, given", [(0, 3), (1, 1), (3, 3), (np.int64(2), 2), (4, 3), (100_000, 3), (2**70, 3)])
def test_threads_are_bounded_by_the_cores(monkeypatch, capsys, asked, given):
    monkeypatch.setattr(resources, "cores", lambda: 3)
    assert resources.bounded_threads(asked) == given
    said = capsys.readouterr().err
    assert said == (f"threads is {asked}; this process has 3 cores: using 3\n" if asked > 3 else "")


@pytest.mark.parametrize("asked", [-1, -(2**70), 2.0, np.nan, "2", None, True])
def test_threads_that_are_no_number_of_threads(litert_model, asked):
    with pytest.raises(UserError, match=r"threads is .*; it must be 0"):
        Runtime(litert_model, threads=asked)


@pytest.mark.parametrize("door", ["runtime", "component", "score", "onnx"])
def test_every_door_bounds_the_threads(litert_model, small_model, monkeypatch, tmp_path, door):
    """What the kernels are given, when more is asked for."""
    from ai_edge_litert import interpreter

    monkeypatch.setattr(resources, "cores", lambda: 1)
    given = []
    load = interpreter.Interpreter
    monkeypatch.setattr(
        interpreter, "Interpreter", lambda path, num_threads: given.append(num_threads) or load(path, num_threads=1)
    )
    manifest = runtime.read_manifest(litert_model)
    if door == "runtime":
        output = tmp_path / "x.png"
        flags = ["--model", str(litert_model), "--prompt", PROMPT, "--output", str(output), "--steps", "1"]
        assert runtime.main([*flags, "--threads", "99999"]) == 0 and output.is_file()
    elif door == "component":
        runtime.load_component(litert_model, manifest, "vae_decoder", 5)
    elif door == "score":
        score.ConvertedModel(litert_model, 12345).runtime.encode_prompt("generate", PROMPT)
    else:
        config = model_folder.load_config(small_model)
        params, _ = exports.load("vae_decoder", small_model, config)
        onnx.export(graph.build("vae_decoder", config, params, Sizes(32, 32, 48)), tmp_path / "x.onnx")
        given.append(onnx_session.open_session(tmp_path / "x.onnx", 77777).get_session_options().intra_op_num_threads)
    assert given and set(given) == {1}


def test_words_without_a_token_are_reported(litert_model):
    lines = []
    drawn = Runtime(litert_model, threads=1).generate("a 🦋 on a hill", steps=1, report=lines.append)
    assert lines[0].startswith("the text encoder does not know '🦋'") and np.isfinite(drawn).all()


@pytest.mark.parametrize(
    ("output", "says"),
    [("folder.png", "is a folder; name a file in it"), ("out.jpg", "must end in .png"), ("file/out.png", "is a file")],
)
def test_an_output_that_cannot_be_written_is_refused_before_anything(tmp_path, output, says):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=says):  # and not that there is no such model
        runtime.main(["--model", str(tmp_path / "none"), "--prompt", "a cat", "--output", str(tmp_path / output)])


@pytest.mark.parametrize("component", ["text", "vae_encoder", "unet", "vae_decoder"])
def test_numbers_that_are_none_draw_nothing(litert_model, monkeypatch, component):
    load = runtime.load_component

    def broken(folder, manifest, name, threads):
        run = load(folder, manifest, name, threads)
        return run if name != component else lambda **inputs: run(**inputs) / np.float32(0)

    monkeypatch.setattr(runtime, "load_component", broken)
    begins = {"text": "the prompt's states", "vae_encoder": "the source's latents",
              "unet": "the latents after step 1 of 2", "vae_decoder": "the picture"}  # fmt: skip
    image = np.zeros((32, 32, 3), np.float32)
    with np.errstate(all="ignore"), pytest.raises(UserError) as error:
        Runtime(litert_model, threads=1).generate(PROMPT, image, steps=2)
    assert str(error.value).startswith(f"{begins[component]}: ") and f"{component}.tflite" in str(error.value)


def test_folders_that_are_not_converted_models(litert_model, small_model, tmp_path):
    for folder, named in ((tmp_path, "no model.json"), (small_model, "format")):
        with pytest.raises(UserError, match=named):
            Runtime(folder)
    partial = tmp_path / "partial"
    shutil.copytree(litert_model, partial)
    (partial / "unet.tflite").unlink()
    with pytest.raises(UserError, match=r"unet\.tflite"):
        Runtime(partial, threads=1).generate(PROMPT)
    shutil.copy(litert_model / "unet.tflite", partial)
    (partial / "tokenizer.json").unlink()  # as a folder without text has none
    manifest = json.loads((partial / "model.json").read_text())
    del manifest["files"]["text"]
    (partial / "model.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="has no text"):
        Runtime(partial, threads=1).generate(PROMPT)
