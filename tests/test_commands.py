"""Command lines: bad input gives exit code 2 and one line that names it, and leaves nothing; good input works."""

import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import tiny
from PIL import Image

import dreamlite_jax
from dreamlite_jax import cli, evaluate, pictures, precompute, sample, train
from dreamlite_jax.data.sprites import __main__ as sprites
from dreamlite_jax.errors import UserError
from dreamlite_jax.text import load

LOADING = dreamlite_jax.load_model


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("commands")
    tiny.write_inputs(root)
    tiny.write_model(root / "model")
    tiny.write_config(root / "config.py", tiny.train_config(root))
    Image.new("RGB", (16, 16), "red").save(root / "red.png")
    Image.new("RGB", (1, 1), "red").save(root / "dot.png")
    (root / "broken.png").write_bytes((root / "red.png").read_bytes()[:40])
    (root / "file").write_text("a file")
    for name in ("folder.png", "many_02.png", "used"):
        (root / name).mkdir()
    (root / "used" / "mine.txt").write_text("mine")
    return root


@pytest.fixture
def root(prepared, monkeypatch):
    """The current folder of the commands. Nothing that is refused gets as far as loading a model."""
    monkeypatch.chdir(prepared)
    monkeypatch.setattr(dreamlite_jax, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    monkeypatch.setattr(load, "load_encoder", lambda *a, **k: tiny.WordEncoder())
    return prepared


COMMANDS = {
    "train": (train.main, {"--config": "config.py", "--workdir": "run"}),
    "sample": (sample.main, {"--model": "model", "--prompt": "a cat", "--output": "new/out.png"}),
    "evaluate": (evaluate.main, {"--model": "model", "--benchmark": "sprites", "--output": "scores"}),
    "precompute": (precompute.main, {"--config": f"{os.getcwd()}/configs/precompute.py", "--output": "latents"}),
    "sprites": (sprites.main, {"--data_dir": "data", "--size": "64"}),
}


def snapshot(root):
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if not path.is_dir()}, sorted(root.rglob("*"))


def refused(capsys, main, argv) -> str:
    """The one line on stderr of a command that exits with 2."""
    with pytest.raises(SystemExit) as exit_:
        cli.run(lambda: main(argv))
    said = capsys.readouterr()
    assert exit_.value.code == 2 and said.out == ""
    (line,) = said.err.splitlines()
    return line.removeprefix("error: ")


@pytest.mark.parametrize(
    ("command", "change", "says"),
    [
        ("train", {"--config.stepz=3": ""}, "config.stepz is not a known field; did you mean 'steps'"),
        ("train", {"--config.optim.b1=x": ""}, "config.optim.b1 is 'x' .*must be float"),
        ("train", {"--confg": "config.py"}, "--confg is not an argument; did you mean '--config'"),
        ("train", {"--config": None}, "required: --config"),
        ("train", {"--config": "nowhere.py"}, "nowhere.py: no such file"),
        ("train", {"--workdir": "used"}, "--workdir used holds 'mine.txt', which no run"),
        ("train", {"--workdir": "file"}, "--workdir .*file is a file"),
        ("train", {"--workdir": "file/below"}, "--workdir .*below cannot be made: .*file is a file"),
        ("train", {"--config.data.sources.0.path=used": ""}, "used holds no complete set of latents"),
        ("train", {"--config.vae=red.png": ""}, r"red.png .* is not a safetensors file"),
        ("train", {"--config.init_from=used": "", "--check": ""}, "used is not a model folder: it lacks model.json"),
        ("sample", {"--width": "21"}, "width 21 is not a positive multiple of 4 pixels; the nearest is 20"),
        ("sample", {"--height": "0"}, "height 0 is not a positive multiple of 4"),
        ("sample", {"--width": "wide"}, "--width: invalid int value: 'wide'"),
        ("sample", {"--prompt": " "}, "prompt is empty"),
        ("sample", {"--prompt": "na\udcefve"}, r"prompt is 'na\\udcefve'; its character 3 is no text"),
        ("sample", {"--prompt": "\u200b"}, r"prompt is '\\u200b', of which nothing can be seen"),
        ("sample", {"--prompt": "🦋"}, "the text encoder knows none of the prompt's words: '🦋'"),
        ("sample", {"--promt": "a cat"}, "--promt is not an argument; did you mean '--prompt'"),
        ("sample", {"--image": "nowhere.png"}, "nowhere.png: no such file"),
        ("sample", {"--image": "broken.png"}, "broken.png cannot be read as a picture"),
        ("sample", {"--image": "dot.png"}, "dot.png is 1x1 pixels; each side must be at least 8"),
        ("sample", {"--output": "out.jpg"}, "--output out.jpg must end in .png"),
        ("sample", {"--output": "used"}, "--output used must end in .png"),
        ("sample", {"--output": "folder.png"}, "--output folder.png is a folder; name a file in it"),
        ("sample", {"--output": "many.png", "--num_images": "3"}, "--output many_02.png is a folder"),
        ("sample", {"--output": "x" * 251 + ".png"}, "this name is longer than the file system takes"),
        ("sample", {"--output": "file/out.png"}, "--output .*file cannot be made: .*file is a file"),
        ("sample", {"--preview": "used"}, "--preview used is not an empty folder"),
        ("sample", {"--preview": "file/previews"}, "--preview .* is a file"),
        ("sample", {"--model": "used"}, "used is not a model folder: it lacks model.json"),
        ("sample", {"--model": "nowhere"}, "model folder nowhere does not exist"),
        ("sample", {"--steps": "0"}, "--steps is 0; it must be at least 1"),
        ("sample", {"--num_images": "0"}, "--num_images is 0"),
        ("sample", {"--batch_size": "0"}, "--batch_size is 0; it must be at least 1"),
        ("sample", {"--seed": "4294967290", "--num_images": "7"}, "the last seed must be at most 4294967295"),
        ("sample", {"--seed": "-1"}, "--seed is -1"),
        ("evaluate", {"--output": "used"}, "--output used is not an empty folder"),
        ("evaluate", {"--output": "file"}, "--output file is not an empty folder"),
        ("evaluate", {"--output": "file/scores"}, "--output .*scores cannot be made: .*file is a file"),
        ("evaluate", {"--items": "7"}, "--items is 7; retrieval among 8 needs at least 8"),
        ("evaluate", {"--steps": "0"}, "--steps is 0"),
        ("evaluate", {"--benchmark": "sprite"}, "--benchmark: invalid choice: 'sprite'"),
        ("evaluate", {"--split": "train"}, "--split: invalid choice: 'train'"),
        (
            "precompute",
            {"--config.batchsize=3": ""},
            "config.batchsize is not a known field; did you mean 'batch_size'",
        ),
        ("precompute", {"--output": "used"}, "--output used is not empty and was not made by precompute"),
        ("precompute", {"--output": "file"}, "--output .*file is a file"),
        ("precompute", {"--output": "file/latents"}, "--output .* is a file"),
        (
            "precompute",
            {"--config.source.name=t2i": "", "--config.source.path=used": ""},
            "config.source.name is 't2i'; .* such as t2i_64",
        ),
        ("precompute", {"--config.source.path=nowhere": ""}, "source nowhere: no such folder"),
        ("precompute", {"--config.source.path=used": ""}, "no finished dataset at used"),
        ("precompute", {"--host": "2", "--hosts": "2"}, "--host 2 is not below --hosts 2"),
        ("sprites", {"--data_dir": "file"}, "--data_dir .*file cannot be made: .*file is a file"),
        ("sprites", {"--size": "65"}, "size is 65; a multiple of 64"),
        ("sprites", {"--train": "0"}, r"counts\['train'\] is 0; a positive integer"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(root, capsys, command, change, says):
    main, given = COMMANDS[command]
    argv = [part for flag, value in {**given, **change}.items() if value is not None for part in (flag, value) if part]
    before = snapshot(root)
    assert re.search(says, refused(capsys, main, argv))
    assert snapshot(root) == before


def test_an_over_long_prompt_is_named_and_leaves_nothing(root, capsys, monkeypatch):
    monkeypatch.undo()  # the real encoder counts its tokens
    monkeypatch.chdir(root)
    before = snapshot(root)
    line = refused(capsys, sample.main, ["--model", "model", "--prompt", "word " * 99, "--output", "new/out.png"])
    assert re.search(r"the prompt has \d+ tokens and the limit is 64: '.*'; shorten it", line)
    assert snapshot(root) == before


def test_sample_writes_pictures_with_their_settings(root, monkeypatch, capsys):
    monkeypatch.setattr(dreamlite_jax, "load_model", LOADING)
    argv = ["--model", "model", "--prompt", "a cat", "--output", "made/cat.png", "--num_images", "2", "--seed", "4"]
    assert sample.main([*argv, "--preview", "made/steps", "--steps", "3"]) == 0
    assert capsys.readouterr().out.split() == ["made/cat_00.png", "made/cat_01.png"]
    assert sorted(p.name for p in (root / "made" / "steps").iterdir()) == [f"step_0{i}.png" for i in range(3)]
    with Image.open("made/cat_01.png") as image:
        settings = json.loads(image.text["dreamlite_jax"])
        assert image.size == (16, 16)
    expected = {"prompt": "a cat", "seed": 5, "steps": 3, "guidance_scale": 2.0, "image": None}
    assert {key: settings[key] for key in expected} == expected
    again = LOADING("model").generate(["a cat"], steps=3, seeds=[5])
    assert np.abs(np.asarray(Image.open("made/cat_01.png")).astype(int) - pictures.to_uint8(again[0])).max() <= 1


def test_sample_says_what_it_cannot_read_and_draws_the_rest(root, monkeypatch, capsys):
    monkeypatch.setattr(dreamlite_jax, "load_model", LOADING)
    assert sample.main(["--model", "model", "--prompt", "a 🦋 on a hill", "--output", "read.png", "--steps", "1"]) == 0
    said = capsys.readouterr().err
    assert said.startswith("the text encoder does not know '🦋', so the picture is drawn without")
    assert said.count("🦋") == 1


def test_sample_writes_each_batch_as_it_is_drawn(root, monkeypatch, capsys):
    """Stopped in the third batch of a hundred and one pictures, two batches are there, numbered for all of them."""
    monkeypatch.setattr(dreamlite_jax, "load_model", LOADING)
    draw, batches = dreamlite_jax.model.Model._draw, []

    def limited(self, *args):
        batches.append(1)
        if len(batches) == 3:
            raise MemoryError
        return draw(self, *args)

    monkeypatch.setattr(dreamlite_jax.model.Model, "_draw", limited)
    monkeypatch.setattr(sample.Tally, "interval_s", 0.0)
    argv = ["--model", "model", "--prompt", "a cat", "--output", "lot/cat.png", "--steps", "1", "--num_images", "101"]
    with pytest.raises(
        UserError, match=r"not enough memory for 3 pictures at a time of 16x16 pixels .*lower batch_size"
    ):
        sample.main([*argv, "--batch_size", "3", "--preview", "lot/steps"])
    said = capsys.readouterr()
    assert said.out.split() == sorted(f"lot/{p.name}" for p in (root / "lot").glob("*.png"))
    assert said.out.split() == [f"lot/cat_{i:03d}.png" for i in range(6)]
    assert re.findall(r"^(\d+ of 101 images, about \d+ min \d\d s left)$", said.err, re.M)
    with Image.open("lot/cat_005.png") as image:
        assert json.loads(image.text["dreamlite_jax"])["seed"] == 5
    with Image.open("lot/steps/step_00.png") as image:
        assert image.size == (48, 16) and json.loads(image.text["dreamlite_jax"])["seeds"] == [0, 1, 2]


@pytest.mark.parametrize(("seconds", "said"), [(0.4, "0 min 00 s"), (59.6, "1 min 00 s"), (3599, "59 min 59 s"),
                                               (3900, "1 h 05 min"), (360_000, "100 h 00 min")])  # fmt: skip
def test_durations(seconds, said):
    assert sample.duration(seconds) == said


def test_the_bar_counts_all_batches_and_says_what_is_left(monkeypatch):
    stream, now = io.StringIO(), iter([0.0, 5.0, 10.0, 100.0])
    monkeypatch.setattr(sample.time, "monotonic", lambda: next(now))
    bar = sample.StepBar(stream)
    for step in range(1, 5):
        bar(step, 4)
    shown = stream.getvalue().split("\r")[1:]
    assert "step 1/4" in shown[0] and "left" not in shown[0]
    assert "step 2/4, 0 min 15 s left" in shown[1] and "step 3/4, 0 min 10 s left" in shown[2]
    assert shown[3].endswith("\n") and not bar.shown


def test_sample_edits_any_readable_picture(root, monkeypatch):
    monkeypatch.setattr(dreamlite_jax, "load_model", LOADING)
    picture = np.random.default_rng(0).integers(0, 255, (40, 30), np.uint8)
    Image.fromarray(picture).convert("LA").save("grey.png")
    argv = ["--model", "model", "--prompt", "make it red", "--image", "grey.png", "--output", "edited.png"]
    assert sample.main([*argv, "--width", "24", "--height", "16"]) == 0
    assert Image.open("edited.png").size == (24, 16)


def test_evaluate_appears_whole_or_not_at_all(root, monkeypatch, capsys):
    monkeypatch.setattr(dreamlite_jax, "load_model", LOADING)
    argv = ["--model", "model", "--benchmark", "sprites", "--items", "8", "--steps", "1"]
    assert evaluate.main([*argv, "--output", "scores"]) == 0
    report = json.loads((root / "scores" / "report.json").read_text())
    assert 0 <= report["validation"]["generate"]["retrieval_hard"] <= 1
    said = capsys.readouterr().out
    assert "sprites/validation, 8 items a task" in said
    floors = report["validation"]["edit"]["floors"]
    for name in ("light grey", "mean colour", "noise", "blank", "untouched"):
        assert f"    without a model, {name}: edit_gain {floors[name]['edit_gain']:.3f}" in said
    assert sorted(p.name for p in (root / "scores").iterdir()) == [
        "edit_validation.png", "generate_validation.png", "report.json",
    ]  # fmt: skip
    monkeypatch.setattr(dreamlite_jax.model.Model, "generate", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate.main([*argv, "--output", "more/scores"])
    assert not list((root / "more").iterdir())


def test_a_command_exits_with_2_and_no_traceback(prepared):
    command = [sys.executable, "-m", "dreamlite_jax.sample", "--model", str(prepared / "model"), "--prompt", "a cat"]
    done = subprocess.run([*command, "--output", str(prepared / "x.jpg")], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --output") and len(done.stderr.splitlines()) == 1


def test_paths_that_are_no_text_are_printed_as_they_were_given():
    code = "from dreamlite_jax import cli; cli.run(lambda: print('caf\\udce9.png'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env={**os.environ, "PYTHONUTF8": "1"})
    assert (done.returncode, done.stdout, done.stderr) == (0, b"caf\xe9.png\n", b"")
