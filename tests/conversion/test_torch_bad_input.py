"""Bad input to from_torch and to_torch: one clear line, exit code 2, nothing written."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import released_folder
from torch_layouts import random_tensors, read_all, write_component, write_json, write_pipeline, write_taesd

from conversion import diffusers_config, from_torch, resources, sources, to_torch, torch_files
from dreamlite_jax import cli
from dreamlite_jax.tensor_files import write_tensors


def truncate(path: Path, cut: int = 100) -> None:
    path.write_bytes(path.read_bytes()[:-cut])


def edit_tensors(path: Path, change) -> None:
    tensors = read_all(path)
    change(tensors)
    write_tensors(path, tensors)


def edit_json(path: Path, **changes: Any) -> None:
    write_json(path, {**json.loads(path.read_text()), **changes})


KEY = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q.weight"
LORA_KEY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q.lora_A.weight"
UNET_FILE = f"unet/{torch_files.WEIGHTS}"


def lora_file(root: Path) -> Path:
    write_tensors(root / "adapter.safetensors", {LORA_KEY: np.zeros((4, 8), np.float32)})
    return root / "adapter.safetensors"


def lora_folder(root: Path) -> Path:
    (root / "adapter").mkdir()
    lora_file(root).rename(root / "adapter" / "pytorch_lora_weights.safetensors")
    return root / "adapter"


def sdxl_unet(root: Path) -> Path:
    config = {"_class_name": "UNet2DConditionModel", "addition_embed_type": "text_time", "cross_attention_dim": 2048}
    return write_component(root / "sdxl", config, {"conv_in.weight": np.zeros((320, 4, 3, 3), np.float32)})


def sdxl_file(root: Path) -> Path:
    shapes = {"conv_in.weight": (8, 4, 3, 3), "down_blocks.0.x": (1,), "add_embedding.linear_1.weight": (8, 2816)}
    write_tensors(root / "sdxl.safetensors", {name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    return root / "sdxl.safetensors"


def sdxl_pipeline(root: Path) -> Path:
    write_json(root / "sdxl" / "model_index.json", {"_class_name": "StableDiffusionXLPipeline"})
    return root / "sdxl"


def half_taesd(root: Path) -> Path:
    write_taesd(root / "taesd")
    (root / "taesd" / "taesd_decoder.safetensors").unlink()
    return root / "taesd" / "taesd_encoder.safetensors"


def pickled(root: Path) -> Path:
    folder = write_pipeline(root / "theirs") / "unet"
    (folder / torch_files.WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")
    return folder


def damaged(change):
    """A pipeline folder after `change(folder)`."""

    def make(root: Path) -> Path:
        folder = write_pipeline(root / "theirs", shards=1)
        change(folder)
        return folder

    return make


def converted(root: Path) -> Path:
    from_torch.convert(str(write_pipeline(root / "theirs")), root / "model")
    return root / "model"


def missing_shard(root: Path) -> Path:
    folder = write_pipeline(root / "theirs", shards=2)
    next((folder / "unet").glob("*-00002-*")).unlink()
    return folder


BAD = {
    "truncated": (damaged(lambda f: truncate(f / UNET_FILE)), ["is truncated", "its header promises"]),
    "truncated autoencoder": (damaged(lambda f: truncate(f / "vae" / torch_files.WEIGHTS)), ["vae", "is truncated"]),
    "no safetensors file": (damaged(lambda f: (f / UNET_FILE).write_bytes(b"hello")), ["is not a safetensors file"]),
    "LoRA file": (lora_file, ["is a LoRA, not a model", "lora_A"]),
    "LoRA folder": (lora_folder, ["is a LoRA, not a model"]),
    "LoRA in place of the U-Net": (
        damaged(lambda f: write_tensors(f / UNET_FILE, {LORA_KEY: np.zeros(4, np.float32)})),
        ["is a LoRA, not a model"],
    ),
    "SDXL U-Net": (sdxl_unet, ["an SDXL U-Net (UNet2DConditionModel)", "not of DreamLite"]),
    "SDXL U-Net file": (sdxl_file, ["looks like an SDXL U-Net"]),
    "SDXL pipeline": (sdxl_pipeline, ["StableDiffusionXLPipeline", "DreamLiteMobilePipeline"]),
    "another architecture": (
        damaged(lambda f: edit_json(f / "unet/config.json", block_out_channels=[64] * 3, attention_head_dim=[2] * 3)),
        ["checkpoint of another architecture"],
    ),
    "missing tensor": (damaged(lambda f: edit_tensors(f / UNET_FILE, lambda t: t.pop(KEY))), [f"{KEY} is missing"]),
    "renamed tensor": (
        damaged(lambda f: edit_tensors(f / UNET_FILE, lambda t: t.update({f"{KEY}s": t.pop(KEY)}))),
        [f"{KEY} is missing (nearest: {KEY}s)", f"{KEY}s is not a tensor of this architecture (nearest: {KEY})"],
    ),
    "extra tensor": (
        damaged(lambda f: edit_tensors(f / UNET_FILE, lambda t: t.update(extra=t[KEY]))),
        ["extra is not a tensor of this architecture"],
    ),
    "misshapen tensor": (
        damaged(lambda f: edit_tensors(f / UNET_FILE, lambda t: t.update({KEY: t[KEY][1:]}))),
        [f"{KEY} has shape (31, 32) and must have (32, 32)"],
    ),
    "integers": (
        damaged(lambda f: edit_tensors(f / UNET_FILE, lambda t: t.update({KEY: t[KEY].astype(np.int8)}))),
        [f"{KEY} is stored as"],
    ),
    "missing shard": (missing_shard, ["lacks", "-00002-of-00002", "which", "names"]),
    "unknown key": (damaged(lambda f: edit_json(f / "unet" / "config.json", ff_mul=3)), ["did you mean 'ff_mult'"]),
    "config that is no JSON": (damaged(lambda f: (f / "vae" / "config.json").write_text("{")), ["is not JSON"]),
    "no autoencoder": (damaged(lambda f: shutil.rmtree(f / "vae")), ["vae", "does not exist"]),
    "half a TAESD": (half_taesd, ["one half of a TAESD"]),
    "pickled weights": (pickled, ["pickled weights", "diffusion_pytorch_model.bin"]),
    "a model folder": (converted, ["is a model folder already", "to_torch"]),
    "an empty folder": (lambda root: (root / "empty").mkdir() or root / "empty", ["no config.json"]),
    "no such path": (lambda root: root / "nothing", ["does not exist", "no hub id"]),
}  # fmt: skip


def run_command(main, argv: list[str], capsys) -> tuple[int, str]:
    """Exit code and stderr of a command."""
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: main(argv))
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize("kind", BAD)
def test_bad_sources_are_refused(kind, tmp_path, capsys):
    make, words = BAD[kind]
    code, error = run_command(
        from_torch.main, ["--source", str(make(tmp_path)), "--output", str(tmp_path / "out")], capsys
    )
    assert code == 2
    assert error.startswith("error: ") and error.count("\n") == 1
    assert all(word in error for word in words), error
    assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob(".out*"))


def test_components_that_need_no_conversion(tmp_path, capsys):
    folder = write_pipeline(tmp_path / "theirs") / "scheduler"
    code, error = run_command(from_torch.main, ["--source", str(folder), "--output", str(tmp_path / "out")], capsys)
    assert code == 2 and "needs no conversion by itself" in error


def test_a_hub_id_without_network(tmp_path, capsys, monkeypatch):
    """Offline as the hub's library has it, and with a network that refuses the connection."""
    import huggingface_hub.constants

    argv = ["--source", "carlofkl/DreamLite-base", "--output", str(tmp_path / "out")]
    code, error = run_command(from_torch.main, argv, capsys)
    assert code == 2 and error.count("\n") == 1
    assert "carlofkl/DreamLite-base@diffusers" in error and "give a local folder" in error

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}")
    code, error = run_command(from_torch.main, argv, capsys)
    assert code == 2 and "the hub cannot be reached" in error


def test_the_output_is_looked_at_before_anything_is_downloaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sources, "download", None)
    (tmp_path / "out").write_text("x")
    for output, message in ((tmp_path / "out", "is a file"), (tmp_path / "out" / "below", "out is a file")):
        argv = ["--source", "carlofkl/DreamLite-base", "--output", str(output)]
        code, error = run_command(from_torch.main, argv, capsys)
        assert code == 2 and message in error


def test_more_than_the_disk_holds_is_refused(tmp_path, capsys, monkeypatch):
    model, source = converted(tmp_path), tmp_path / "theirs"
    monkeypatch.setattr(resources, "available_disk", lambda folder: 1000)
    out = ["--output", str(tmp_path / "out")]
    for main, argv in ((from_torch.main, ["--source", str(source)]), (to_torch.main, ["--model", str(model)])):
        code, error = run_command(main, argv + out, capsys)
        assert code == 2 and "of disk; 0.0 GB are free" in error
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("source", "is_id"),
    [("a/b", True), ("a/b@main", True), ("a/b/c", False), ("a", False), ("./a/b", False), ("/a/b", False)],
)
def test_what_counts_as_a_hub_id(source, is_id):
    assert bool(sources.HUB_ID.fullmatch(source)) == is_id


def test_a_text_encoder_of_another_width(released, tmp_path, capsys):
    _, source, *_ = released
    shutil.copytree(source, tmp_path / "theirs")
    config = dataclasses.replace(released_folder.UNET, text_dim=64)
    shutil.rmtree(tmp_path / "theirs" / "unet")
    tensors = random_tensors("unet", config)
    write_component(tmp_path / "theirs" / "unet", diffusers_config.unet_to_diffusers(config), tensors)
    argv = ["--source", str(tmp_path / "theirs"), "--output", str(tmp_path / "out")]
    code, error = run_command(from_torch.main, argv, capsys)
    assert code == 2 and "hidden_size is 48, but the U-Net takes text states of width 64" in error


def test_a_truncated_text_encoder(released, tmp_path, capsys):
    _, source, *_ = released
    shutil.copytree(source, tmp_path / "theirs")
    truncate(tmp_path / "theirs" / "text_encoder" / "model.safetensors")
    argv = ["--source", str(tmp_path / "theirs"), "--output", str(tmp_path / "out")]
    code, error = run_command(from_torch.main, argv, capsys)
    assert code == 2 and "is truncated" in error


def test_options_that_do_not_go_together(tmp_path, capsys):
    folder = write_pipeline(tmp_path / "theirs")
    out = ["--output", str(tmp_path / "out")]
    for argv, message in (
        (["--source", str(folder), "--vae", str(folder / "vae")], "--vae goes with a --source that is a U-Net alone"),
        (["--source", str(folder / "unet"), "--vae", str(folder / "unet")], "it must be an AutoencoderTiny"),
    ):
        code, error = run_command(from_torch.main, argv + out, capsys)
        assert code == 2 and message in error
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    code, error = run_command(from_torch.main, ["--source", str(folder), *out], capsys)
    assert code == 2 and "is not empty" in error


def test_models_that_to_torch_refuses(tmp_path, capsys):
    out = ["--output", str(tmp_path / "out")]
    code, error = run_command(to_torch.main, ["--model", str(tmp_path / "nothing"), *out], capsys)
    assert code == 2 and "does not exist" in error
    model = converted(tmp_path)
    truncate(model / "unet.safetensors")
    code, error = run_command(to_torch.main, ["--model", str(model), *out], capsys)
    assert code == 2 and "is truncated" in error
    edit_json(model / "model.json", config={"unet": {"in_channels": 8, "condition_layout": "channel"}})
    code, error = run_command(to_torch.main, ["--model", str(model), *out], capsys)
    assert code == 2 and "only join panels on width" in error
    assert not (tmp_path / "out").exists()


def test_the_commands_succeed(tmp_path, capsys):
    source = write_pipeline(tmp_path / "theirs")
    assert from_torch.main(["--source", str(source), "--output", str(tmp_path / "ours")]) == 0
    assert to_torch.main(["--model", str(tmp_path / "ours"), "--output", str(tmp_path / "back")]) == 0
    printed = capsys.readouterr().out
    assert "unet: " in printed and "text_encoder: not there" in printed
