"""Whole pipelines against diffusers: a released folder read as it is, prompts and pictures in, latents and pixels out.

Ours run in one batch what the oracle is asked one image at a time.
"""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import released_folder
from PIL import Image

import dreamlite_jax
from conversion import from_torch
from dreamlite_jax import pictures
from dreamlite_jax.errors import UserError
from dreamlite_jax.parallel import sharding
from dreamlite_jax.text.encoder import PromptRequest

WIDTH, HEIGHT = 96, 64
TOLERANCE = 1e-3  # of final latents, which are of order 1
CONTROL = 10 * TOLERANCE
STEPS, SCALE, IMAGE_SCALE = 28, 3.5, 1.5
# Two images of one prompt, and one of another of another length. (Space around a prompt is stripped here, not there.)
PROMPTS = ["a red fox on a frozen lake", "a red fox on a frozen lake", "an old bridge at dusk, small boats, fog" * 4]
EDITS = ["a blue door", "a blue door", "snow on the roof and no people anywhere"]
SEEDS = [3, 4, 5]


def picture(width: int, height: int, seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


SOURCES = [picture(300, 200, 0), picture(300, 200, 0), picture(64, 150, 1)]


@pytest.fixture(scope="module")
def parts():
    return released_folder.components()


@pytest.fixture(scope="module")
def one_device():
    """Batches that do not divide among devices are computed on each of them: eight times the work here."""
    make_mesh = sharding.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def folders(parts, tmp_path_factory):
    """Both pipelines on disk, the second with its U-Net in shards."""
    root = tmp_path_factory.mktemp("released")
    made = {"DreamLitePipeline": {}, "DreamLiteMobilePipeline": {"max_shard_size": "500KB"}}
    paths = {name: released_folder.write(root / name, parts, name, **save) for name, save in made.items()}
    assert [len(list((path / "unet").glob("*.safetensors"))) > 1 for path in paths.values()] == [False, True]
    return paths


@pytest.fixture(scope="module")
def base(folders, one_device):
    return dreamlite_jax.load_model(folders["DreamLitePipeline"], text_dtype=jnp.float32)


@pytest.fixture(scope="module")
def mobile(folders, one_device):
    return dreamlite_jax.load_model(folders["DreamLiteMobilePipeline"], text_dtype=jnp.float32)


def noise(seed: int) -> np.ndarray:
    """Start latents (1, h, w, c), those of a pipeline whose generator has this seed."""
    import torch

    shape = (1, released_folder.VAE.latent_channels, HEIGHT // 8, WIDTH // 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).permute(0, 2, 3, 1).numpy()


def oracle(parts, name: str, prompts, sources=None, size=(WIDTH, HEIGHT), **options):
    """Final latents (b, h, w, c) and pictures (b, H, W, 3) uint8 of the pipeline called once an image.

    Without `size` it is asked for none.
    """
    import diffusers
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: on busy cores several threads took fifteen times as long
    pipeline = getattr(diffusers, name)(**parts)
    pipeline.set_progress_bar_config(disable=True)
    latents, images, decode = [], [], pipeline.vae.decode
    if size:
        options |= {"width": size[0], "height": size[1]}

    def recording(x, **rest):
        latents.append(x.permute(0, 2, 3, 1).numpy())
        return decode(x, **rest)

    pipeline.vae.decode = recording
    try:
        for i, prompt in enumerate(prompts):
            source = {} if sources is None else {"image": sources[i]}
            generator = torch.Generator().manual_seed(SEEDS[i])
            done = pipeline(prompt, generator=generator, **source, **options)
            images.append(np.asarray(done.images[0]))
    finally:
        del pipeline.vae.decode
        torch.set_num_threads(threads)
    return np.concatenate(latents), np.stack(images)


def ours(model, prompts, sources=None, size=(WIDTH, HEIGHT), **options):
    start = np.concatenate([noise(seed) for seed in SEEDS[: len(prompts)]])
    width, height = size or (None, None)
    return model.run(prompts, images=sources, width=width, height=height, latents=start, **options)


def check(result, expected) -> None:
    """The parity check itself."""
    latents, images = expected
    assert np.abs(latents).max() > 0.5
    assert result.images.shape == images.shape
    difference = np.abs(result.latents - latents).max()
    levels = np.abs(pictures.to_uint8(result.images).astype(int) - images.astype(int)).max()
    print(f"latents differ by {difference:.1e} at most, pixels by {levels}/255")
    assert difference <= TOLERANCE
    assert levels <= 1


@pytest.fixture(scope="module")
def generated(parts):
    return oracle(parts, "DreamLitePipeline", PROMPTS, num_inference_steps=STEPS)


@pytest.fixture(scope="module")
def edited(parts):
    return oracle(parts, "DreamLitePipeline", EDITS, SOURCES, num_inference_steps=STEPS)


def test_generate_equals_the_pipeline(base, generated):
    check(ours(base, PROMPTS, steps=STEPS, guidance_scale=SCALE), generated)


def test_edit_equals_the_pipeline(base, edited):
    check(ours(base, EDITS, SOURCES, steps=STEPS, guidance_scale=SCALE, image_guidance_scale=IMAGE_SCALE), edited)


def test_mobile_generates_as_the_pipeline(parts, mobile):
    check(ours(mobile, PROMPTS), oracle(parts, "DreamLiteMobilePipeline", PROMPTS))


def test_mobile_edits_as_the_pipeline(parts, mobile):
    check(ours(mobile, EDITS, SOURCES), oracle(parts, "DreamLiteMobilePipeline", EDITS, SOURCES))


def test_an_edit_has_the_size_of_its_source(parts, mobile):
    """Where none is asked for. The pipeline rounds down to 8 pixels, and cannot run most of that; ours to 32."""
    sources = [picture(WIDTH + 3, HEIGHT + 7, seed) for seed in range(3)]
    expected = oracle(parts, "DreamLiteMobilePipeline", EDITS, sources, size=None)
    assert expected[1].shape == (3, HEIGHT, WIDTH, 3)
    check(ours(mobile, EDITS, sources, size=None), expected)


@pytest.mark.parametrize("scales", [(1.0, IMAGE_SCALE), (0.5, 0.0)])
def test_small_scales_mean_what_they_do_in_the_pipeline(parts, base, scales):
    options = {"guidance_scale": scales[0], "image_guidance_scale": scales[1]}
    expected = oracle(parts, "DreamLitePipeline", EDITS[:1], SOURCES[:1], num_inference_steps=2, **options)
    check(ours(base, EDITS[:1], SOURCES[:1], steps=2, **options), expected)


def test_the_folder_says_how_to_sample(base, mobile):
    for model, steps, scale in ((base, 30, SCALE), (mobile, 4, 1.0)):
        config = model.config
        assert (config.steps, config.guidance_scale, config.native_size) == (steps, scale, 1024)
        assert config.scheduler == released_folder.SCHEDULER
        assert (config.unet, config.vae) == (released_folder.UNET, released_folder.VAE)
    assert base.config.image_guidance_scale == IMAGE_SCALE


def test_a_converted_folder_is_the_same_model(base, folders, tmp_path, one_device):
    from_torch.convert(str(folders["DreamLitePipeline"]), tmp_path / "ours")
    converted = dreamlite_jax.load_model(tmp_path / "ours", text_dtype=jnp.float32)
    assert converted.config == base.config
    jax.tree.map(np.testing.assert_array_equal, converted._params, base._params)
    for got, expected in zip(converted.encode_prompts(PROMPTS[:1]), base.encode_prompts(PROMPTS[:1]), strict=True):
        # Equal weights in another order of sums, since each model compiles its own sampler.
        np.testing.assert_allclose(got, expected, atol=1e-5)
    shutil.rmtree(tmp_path / "ours" / "text_encoder")
    without = dreamlite_jax.load_model(tmp_path / "ours")
    with pytest.raises(UserError, match=r"ours has no text_encoder/config\.json; this model's prompts are encoded by"):
        without.generate(PROMPTS[:1], width=WIDTH, height=HEIGHT)


def test_another_pipeline_is_refused(folders, tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    with pytest.raises(
        UserError, match="of a StableDiffusionXLPipeline; it must be of DreamLitePipeline or DreamLiteM"
    ):
        dreamlite_jax.load_model(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "DreamLitePipeline"}')
    with pytest.raises(UserError, match=r"unet.config\.json does not exist"):
        dreamlite_jax.load_model(tmp_path)


# ------------------------------------------------------------------- the same checks must catch what ports get wrong


def conditioning(change):
    """A model whose branches see something else: `change` maps (model, Conditioning) to a Conditioning."""

    def apply(monkeypatch, model):
        condition = model._condition
        monkeypatch.setattr(model, "_condition", lambda *inputs: change(model, condition(*inputs)))

    return apply


def black_instead_of_zeros(model, seen):
    black = model.encode_images(-np.ones((1, HEIGHT, WIDTH, 3), np.float32))
    blank = jnp.all(seen.image == 0, axis=(2, 3, 4), keepdims=True)
    return seen._replace(image=jnp.where(blank, black[None], seen.image))


def nulls_without_the_source(branches: int):
    def change(model, seen):
        length = seen.text.shape[2]
        null = model.encoder.encode([PromptRequest("null", "")], length)
        text, mask = np.array(seen.text), np.array(seen.mask)
        text[:branches], mask[:branches] = null.states, null.mask
        return seen._replace(text=jnp.asarray(text), mask=jnp.asarray(mask))

    return change


def no_mask(model, seen):
    return seen._replace(mask=jnp.ones_like(seen.mask))


def scheduler(**change):
    def apply(monkeypatch, model):
        other = dataclasses.replace(model.config.scheduler, **change)
        monkeypatch.setattr(model, "config", dataclasses.replace(model.config, scheduler=other))

    return apply


def nothing(monkeypatch, model):
    pass


# What is wrong, for which task, and the scales asked for.
CONTROLS = {
    "shift of the defaults": (scheduler(base_shift=0.5), "generate", SCALE, IMAGE_SCALE),
    "no shift": (scheduler(base_shift=0.0, max_shift=0.0), "generate", SCALE, IMAGE_SCALE),
    "black instead of zeros": (conditioning(black_instead_of_zeros), "generate", SCALE, IMAGE_SCALE),
    "padding not masked": (conditioning(no_mask), "generate", SCALE, IMAGE_SCALE),
    "scale": (nothing, "generate", 3.0, IMAGE_SCALE),
    "scales swapped": (nothing, "edit", IMAGE_SCALE, SCALE),
    "script's image scale": (nothing, "edit", SCALE, 1.0),
    "black instead of zeros, edit": (conditioning(black_instead_of_zeros), "edit", SCALE, IMAGE_SCALE),
    "first null without the source": (conditioning(nulls_without_the_source(1)), "edit", SCALE, IMAGE_SCALE),
    "both nulls without the source": (conditioning(nulls_without_the_source(2)), "edit", SCALE, IMAGE_SCALE),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_the_check_catches(monkeypatch, base, generated, edited, name):
    wrong, task, scale, image_scale = CONTROLS[name]
    prompts, sources, expected = (PROMPTS, None, generated) if task == "generate" else (EDITS, SOURCES, edited)
    wrong(monkeypatch, base)
    result = ours(base, prompts, sources, steps=STEPS, guidance_scale=scale, image_guidance_scale=image_scale)
    assert np.abs(result.latents - expected[0]).max() > CONTROL


def test_pictures_are_fitted_as_the_pipeline_does(parts):
    """At the size of the condition panel; the encoder's 512 px are tested with the encoder."""
    import diffusers

    pipeline = diffusers.DreamLitePipeline(**parts)
    for source in (*SOURCES, picture(WIDTH, HEIGHT, 2)):
        expected = pipeline.image_processor.preprocess(source, height=HEIGHT, width=WIDTH)
        np.testing.assert_allclose(pictures.fit(source, WIDTH, HEIGHT), expected[0].permute(1, 2, 0), atol=1e-6)
    bicubic = SOURCES[0].resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    assert np.abs(pictures.to_float(np.asarray(bicubic)) - pictures.fit(SOURCES[0], WIDTH, HEIGHT)).max() > 0.01


def test_steps_are_reported_and_change_nothing(mobile):
    told = []
    quiet = ours(mobile, PROMPTS[:1], steps=3)
    loud = ours(mobile, PROMPTS[:1], steps=3, progress=lambda *step: told.append(step))
    assert told == [(1, 3), (2, 3), (3, 3)]
    np.testing.assert_array_equal(loud.latents, quiet.latents)
    ours(mobile, PROMPTS[:1], steps=3)
    assert len(told) == 3
