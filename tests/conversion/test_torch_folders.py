"""from_torch and to_torch: there and back bit by bit, for every form of a source."""

import json

import jax
import ml_dtypes
import numpy as np
import oracles
import pytest
import released_folder
from torch_layouts import (
    DTYPES,
    SCHEDULER,
    UNET,
    VAE,
    assert_same_bits,
    read_all,
    read_component,
    write_component,
    write_pipeline,
    write_taesd,
)  # fmt: skip

from conversion import diffusers_config, from_torch, names, to_torch, torch_files
from dreamlite_jax import model_folder
from dreamlite_jax.config import ModelConfig, TextConfig, VAEConfig

# --- there and back

LAYOUTS = {
    "base, fp32": ("DreamLitePipeline", "fp32", 1, ""),
    "base, bf16, 3 shards": ("DreamLitePipeline", "bf16", 3, ""),
    "mobile, fp16": ("DreamLiteMobilePipeline", "fp16", 1, ""),
    "mobile, fp16 variant": ("DreamLiteMobilePipeline", "fp16", 1, ".fp16"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_diffusers_folder_there_and_back(layout, tmp_path):
    name, dtype, shards, variant = LAYOUTS[layout]
    source = write_pipeline(tmp_path / "theirs", name, DTYPES[dtype], shards, variant)
    report = from_torch.convert(str(source), tmp_path / "ours")
    to_torch.convert(tmp_path / "ours", tmp_path / "back")
    for component in model_folder.COMPONENTS:
        assert_same_bits(read_component(source / component), read_component(tmp_path / "back" / component))
    assert report["components"]["unet"]["dtypes"] == [{"fp32": "F32", "fp16": "F16", "bf16": "BF16"}[dtype]]

    config = model_folder.load_config(tmp_path / "ours")
    assert (config.unet, config.vae, config.scheduler) == (UNET, VAE, SCHEDULER)
    assert (config.native_size, config.text.encoder) == (256, "qwen3_vl")
    mobile = "Mobile" in name
    assert (config.steps, config.guidance_scale, config.image_guidance_scale) == (
        (4, 1, 1) if mobile else (30, 3.5, 1.5)
    )
    assert json.loads((tmp_path / "back" / "model_index.json").read_text())["_class_name"] == name
    written = json.loads((tmp_path / "back" / "unet" / "config.json").read_text())
    assert written == diffusers_config.unet_to_diffusers(UNET, 32)


def random_model():
    """Config and parameters of a small model with the small text encoder."""
    config = ModelConfig(unet=UNET, vae=VAE, text=TextConfig(encoder="minilm"), native_size=64)
    rng = np.random.default_rng(0)
    shapes = {name: model_folder.expected_shapes(name, getattr(config, name)) for name in model_folder.COMPONENTS}
    return config, {
        name: model_folder.unflatten({path: rng.standard_normal(shape, np.float32) for path, shape in part.items()})
        for name, part in shapes.items()
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_model_folder_there_and_back(dtype, tmp_path):
    config, params = random_model()
    ours = model_folder.save_model(tmp_path / "ours", config, params, {}, dtype=DTYPES[dtype])
    report = to_torch.convert(ours, tmp_path / "theirs")
    assert "minilm" in report["absent"]["text_encoder"]
    from_torch.convert(str(tmp_path / "theirs"), tmp_path / "back")
    for component in model_folder.COMPONENTS:
        file = model_folder.weight_file(component)
        assert_same_bits(read_all(ours / file), read_all(tmp_path / "back" / file))
    assert model_folder.load_config(tmp_path / "back").unet == UNET


def test_a_compact_model_goes_there_as_the_floats_that_it_stands_for(tmp_path):
    config, params = random_model()
    ours = model_folder.save_model(tmp_path / "ours", config, params, {}, dtype=np.int8)
    to_torch.convert(ours, tmp_path / "theirs")
    from_torch.convert(str(tmp_path / "theirs"), tmp_path / "back")
    for component in model_folder.COMPONENTS:
        there = model_folder.flatten(model_folder.load_params(ours, component))
        assert_same_bits(there, model_folder.flatten(model_folder.load_params(tmp_path / "back", component)))
    assert model_folder.load_config(tmp_path / "back").unet == UNET


def test_a_wrong_layout_is_not_bit_equal(tmp_path, monkeypatch):
    """The check above sees a convolution whose rows and columns are exchanged."""
    source = write_pipeline(tmp_path / "theirs")
    from_torch.convert(str(source), tmp_path / "ours")
    monkeypatch.setitem(names._TO_TORCH, 4, (3, 2, 1, 0))
    to_torch.convert(tmp_path / "ours", tmp_path / "back")
    with pytest.raises(AssertionError):
        assert_same_bits(read_component(source / "unet"), read_component(tmp_path / "back" / "unet"))


def test_the_older_block_names(tmp_path):
    source = write_pipeline(tmp_path / "theirs")
    path = source / "unet" / "config.json"
    older = path.read_text()
    for new, old in (
        ("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "CrossAttnDownRemoveSelfAttnBlock2D"),
        ("DreamLiteCrossAttnNoSelfAttnUpBlock2D", "CrossAttnUpRemoveSelfAttnBlock2DV1"),
        ("DreamLiteUNetMidBlock2DCrossAttn", "UNetMidBlock2DCrossAttn"),
        ("DreamLiteCrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        ("DreamLiteCrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        ("DreamLiteUpBlock2D", "UpBlock2D"),
    ):
        assert new in older
        older = older.replace(new, old)
    path.write_text(older)
    from_torch.convert(str(source), tmp_path / "ours")
    assert model_folder.load_config(tmp_path / "ours").unet == UNET


def test_the_report_lists_every_tensor(tmp_path):
    source = write_pipeline(tmp_path / "theirs", dtype=ml_dtypes.bfloat16)
    from_torch.convert(str(source), tmp_path / "ours")
    report = json.loads((tmp_path / "ours" / "report.json").read_text())
    tensors = read_component(source / "unet")
    rows = report["components"]["unet"]["mapping"]
    assert {row["torch"]: row["torch_shape"] for row in rows} == {name: list(t.shape) for name, t in tensors.items()}
    stored = read_all(tmp_path / "ours" / "unet.safetensors")
    assert {row["ours"]: row["shape"] for row in rows} == {name: list(t.shape) for name, t in stored.items()}
    assert {row["dtype"] for row in rows} == {"BF16"}
    assert report["components"]["unet"]["parameters"] == sum(t.size for t in tensors.values())
    assert set(report["absent"]) == {"text_encoder", "tokenizer", "processor"}
    assert report["peak_memory_bytes"] > 0


# --- what diffusers makes of it


def test_text_parts_are_carried_byte_by_byte(released):
    _, source, ours, back, report = released
    assert len(torch_files.weight_files(source / "unet")) > 1
    assert report["carried"] == list(torch_files.TEXT_PARTS)
    for part in torch_files.TEXT_PARTS:
        files = {path.relative_to(source): path.read_bytes() for path in (source / part).rglob("*") if path.is_file()}
        assert files
        for copy in (ours, back):
            assert {p.relative_to(copy): p.read_bytes() for p in (copy / part).rglob("*") if p.is_file()} == files


@pytest.mark.parametrize("name", ["DreamLitePipeline", "DreamLiteMobilePipeline"])
def test_both_pipelines_load_the_folder_as_it_is(released, name):
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    parts, _, _, back, _ = released
    given = {}
    if not diffusers.utils.import_utils.is_torchvision_available():
        given["processor"] = parts[
            "processor"
        ]  # transformers reads a processor with videos, for which it wants torchvision
    pipeline = getattr(diffusers, name).from_pretrained(back, **given)
    for part in ("unet", "vae", "text_encoder"):
        state = getattr(pipeline, part).state_dict()
        assert state.keys() == parts[part].state_dict().keys()
        assert all(torch.equal(state[key], value) for key, value in parts[part].state_dict().items())
    for key, value in parts["scheduler"].config.items():
        assert key.startswith("_") or pipeline.scheduler.config[key] == value, key
    assert pipeline.tokenizer("a cat")["input_ids"] == parts["tokenizer"]("a cat")["input_ids"]


def test_converted_parameters_compute_what_the_torch_model_does(released):
    import jax.numpy as jnp

    from dreamlite_jax.models.unet import UNet

    parts, _, ours, _, _ = released
    params = jax.tree.map(jnp.asarray, model_folder.load_params(ours, "unet"))
    inputs = oracles.unet_inputs(released_folder.UNET, 4, 8, [300.0], [5], 7)
    velocity = jax.jit(UNet(released_folder.UNET).apply)({"params": params}, *map(jnp.asarray, inputs.arrays()))
    assert np.abs(np.asarray(velocity) - oracles.torch_velocity(parts["unet"], inputs)).max() < 1e-5


def test_a_model_with_our_text_encoder_loads_without_one(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    write_pipeline(tmp_path / "theirs")
    from_torch.convert(str(tmp_path / "theirs"), tmp_path / "ours")
    to_torch.convert(tmp_path / "ours", tmp_path / "back")
    nothing = dict.fromkeys(torch_files.TEXT_PARTS)
    pipeline = diffusers.DreamLitePipeline.from_pretrained(tmp_path / "back", **nothing)
    assert pipeline.text_encoder is None
    assert sum(p.numel() for p in pipeline.unet.parameters()) == sum(
        t.size for t in read_component(tmp_path / "theirs" / "unet").values()
    )


# --- components


def test_a_unet_alone(tmp_path):
    source = write_pipeline(tmp_path / "theirs")
    report = from_torch.convert(str(source / "unet"), tmp_path / "ours")
    assert model_folder.load_config(tmp_path / "ours").unet == UNET
    assert "--vae" in report["absent"]["vae"]
    with pytest.raises(ValueError, match=r"lacks vae\.safetensors"):
        model_folder.load_params(tmp_path / "ours", "vae")
    to_torch.convert(tmp_path / "ours", tmp_path / "back")
    assert_same_bits(read_component(source / "unet"), read_component(tmp_path / "back" / "unet"))
    assert json.loads((tmp_path / "back" / "model_index.json").read_text())["vae"] == [None, None]


def test_a_unet_with_an_autoencoder_from_elsewhere(tmp_path):
    source = write_pipeline(tmp_path / "theirs")
    from_torch.convert(str(source / "unet"), tmp_path / "ours", vae=str(source / "vae"))
    assert model_folder.load_config(tmp_path / "ours").vae == VAE
    to_torch.convert(tmp_path / "ours", tmp_path / "back")
    assert_same_bits(read_component(source / "vae"), read_component(tmp_path / "back" / "vae"))


@pytest.mark.parametrize("which", ["", "taesd_encoder.safetensors", "taesd_decoder.safetensors"])
def test_the_original_taesd(which, tmp_path):
    theirs = write_taesd(tmp_path / "taesd")
    from_torch.convert(str(tmp_path / "taesd" / which), tmp_path / "taesd_ours")
    write_component(tmp_path / "tiny", diffusers_config.vae_to_diffusers(VAE), theirs)
    from_torch.convert(str(tmp_path / "tiny"), tmp_path / "tiny_ours")
    config, params = model_folder.load_vae(tmp_path / "taesd_ours" / "vae.safetensors", dtype=None)
    other_config, other = model_folder.load_vae(tmp_path / "tiny_ours" / "vae.safetensors", dtype=None)
    assert config == other_config == VAE
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(ml_dtypes.bfloat16)}
    assert_same_bits(model_folder.flatten(params), model_folder.flatten(other))


def test_the_real_taesdxl(tmp_path):
    source = oracles.SHARED_DATA / "taesdxl"
    if not source.is_dir():
        pytest.skip(f"the real TAESDXL files are not in {source}; DREAMLITE_SHARED_DATA names another folder")
    report = from_torch.convert(str(source), tmp_path / "ours")
    config, _ = model_folder.load_vae(tmp_path / "ours" / "vae.safetensors")
    assert config == VAEConfig()
    assert report["components"]["vae"]["parameters"] == 1_222_532 + 1_222_531


def test_a_text_encoder_alone(released, tmp_path):
    _, source, *_ = released
    report = from_torch.convert(str(source / "text_encoder"), tmp_path / "ours")
    assert report["carried"] == ["text_encoder"]
    file = "text_encoder/model.safetensors"
    assert (tmp_path / "ours" / file).read_bytes() == (source / file).read_bytes()
