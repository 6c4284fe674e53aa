"""The Python API on a random model: shapes and kinds, seeds, both tasks, and what it refuses."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

import dreamlite_jax
from dreamlite_jax import model, model_folder, pictures
from dreamlite_jax.config import image_size
from dreamlite_jax.errors import UserError
from dreamlite_jax.models.unet import UNet
from dreamlite_jax.models.vae import VAE
from dreamlite_jax.training import sharding

PROMPTS = ["a cat", "two red hearts on a blue background", "a dog to the left of a star"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def m(folder):
    return dreamlite_jax.load_model(folder)


@pytest.fixture(scope="module")
def sources():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)) for _ in PROMPTS]


@pytest.fixture
def unet_batches(monkeypatch):
    """Batch sizes of the network's calls, recorded while they are traced."""
    sizes, apply = [], model.Model._apply_unet

    def recording(self, params, sample, *rest):
        sizes.append(sample.shape[0])
        return apply(self, params, sample, *rest)

    monkeypatch.setattr(model.Model, "_apply_unet", recording)
    return sizes


def is_image(array, *shape):
    return array.shape == shape and array.dtype == np.float32 and np.isfinite(array).all()


def test_velocity_is_the_network(m):
    rng = np.random.default_rng(0)
    inputs = (
        rng.normal(size=(2, 4, 8, 4)), [0.0, 730.0], rng.normal(size=(2, 5, tiny.TEXT_DIM)),
        [[1, 1, 1, 0, 0], [1] * 5], [[16, 16], [16, 16]],
    )  # fmt: skip
    inputs = [np.asarray(x, np.float32) for x in inputs]
    v = m.velocity(*inputs)
    assert is_image(v, 2, 4, 8, 4)
    expected = UNet(tiny.CONFIG.unet).apply({"params": tiny.unet_params()}, *inputs)
    np.testing.assert_allclose(v, expected, atol=1e-5)
    hidden = [x.copy() for x in inputs]
    hidden[2][0, 3:] = 9.0  # behind the mask
    np.testing.assert_allclose(m.velocity(*hidden), v, atol=1e-5)


def test_images_and_latents_go_through_the_autoencoder(m):
    images = np.random.default_rng(0).uniform(-1, 1, (3, 24, 16, 3)).astype(np.float32)
    latents = m.encode_images(images)
    assert is_image(latents, 3, 6, 4, 4)
    vae, params = VAE(tiny.CONFIG.vae), tiny.vae_params()
    np.testing.assert_allclose(latents, vae.apply({"params": params}, images, method="encode"), atol=1e-5)
    decoded = m.decode_latents(latents)
    assert is_image(decoded, 3, 24, 16, 3)
    np.testing.assert_allclose(decoded, vae.apply({"params": params}, latents, method="decode"), atol=1e-5)
    many = np.repeat(images[:1], 70, 0)  # more than are computed at a time
    np.testing.assert_allclose(m.encode_images(many), np.repeat(latents[:1], 70, 0), atol=1e-5)


def test_prompts_are_encoded_by_task(m, sources):
    states, mask = m.encode_prompts(PROMPTS)
    assert states.shape == (*mask.shape, tiny.TEXT_DIM) and states.dtype == mask.dtype == np.float32
    assert len(set(mask.sum(1))) > 1 and not states[mask == 0].any()
    edits = m.encode_prompts(PROMPTS, sources)
    assert (edits.mask.sum(1) > mask.sum(1)).all()  # the edit's tag is a sentence


def test_an_image_depends_on_its_own_prompt_and_seed(m):
    images = m.generate(PROMPTS, steps=2, seeds=[5, 6, 7])
    assert is_image(images, 3, 16, 16, 3) and np.abs(images).max() <= 1
    alone = m.generate(PROMPTS[1:2], steps=2, seeds=[6])
    np.testing.assert_allclose(alone[0], images[1], atol=1e-5)
    among_eight = m.generate([PROMPTS[1]] * 8, steps=2, seeds=range(8))  # as many as devices: the batch is split
    np.testing.assert_allclose(among_eight[6], images[1], atol=1e-5)
    assert np.abs(among_eight[5] - images[1]).max() > 1e-3
    assert np.abs(m.generate(PROMPTS[:1], steps=2, seeds=[6]) - images[1]).max() > 1e-5  # another prompt


def test_editing_depends_on_the_source(m, sources):
    images = m.generate(PROMPTS, images=sources, steps=2, seeds=[5, 6, 7])
    assert is_image(images, 3, 16, 16, 3)
    alone = m.generate(PROMPTS[1:2], images=sources[1:2], steps=2, seeds=[6])
    np.testing.assert_allclose(alone[0], images[1], atol=1e-5)
    other = m.generate(PROMPTS[1:2], images=sources[:1], steps=2, seeds=[6])
    assert np.abs(other[0] - images[1]).max() > 1e-4
    large = [sources[1].resize((64, 48), Image.Resampling.NEAREST)]
    squashed = [Image.fromarray(pictures.to_uint8(pictures.fit(large[0], 16, 16)))]
    given, expected = (m.generate(PROMPTS[:1], images=x, steps=2) for x in (large, squashed))
    np.testing.assert_allclose(given, expected, atol=1e-5)


def test_run_shows_the_way(m):
    result = m.run(PROMPTS[:2], steps=3, width=24, height=16, guidance_scale=1.0)
    assert is_image(result.images, 2, 16, 24, 3) and is_image(result.latents, 2, 4, 6, 4)
    assert is_image(result.trajectory, 3, 2, 4, 6, 4)
    np.testing.assert_allclose(result.trajectory[-1], result.latents, atol=1e-5)
    np.testing.assert_allclose(np.clip(m.decode_latents(result.latents), -1, 1), result.images, atol=1e-6)
    assert np.array_equal(m.generate(PROMPTS[:2], steps=3, width=24, height=16, guidance_scale=1.0), result.images)


def test_start_noise_can_be_given(m):
    latents = np.random.default_rng(0).normal(size=(1, 4, 4, 4))
    a, b = m.generate(PROMPTS[:1], latents=latents), m.generate(PROMPTS[:1], latents=latents, seeds=[9])
    assert np.array_equal(a, b) and np.abs(a - m.generate(PROMPTS[:1])).max() > 1e-3


@pytest.mark.parametrize(
    ("scale", "image_scale", "editing", "branches"),
    [(1.0, 1.5, False, 1), (1.0, 1.0, True, 1), (2.0, 1.5, False, 2), (1.0, 1.5, True, 3)],
)
def test_guidance_costs_only_what_it_needs(folder, sources, unet_batches, scale, image_scale, editing, branches):
    fresh = dreamlite_jax.load_model(folder)
    fresh.encoder = tiny.WordEncoder()
    images, scales = sources if editing else None, {"guidance_scale": scale, "image_guidance_scale": image_scale}
    fresh.generate(PROMPTS, images=images, steps=2, **scales)
    assert set(unet_batches) == {3 * branches}


def test_the_folder_decides_the_defaults(m):
    config = tiny.CONFIG
    said = dict(steps=config.steps, guidance_scale=config.guidance_scale, width=16, height=16, seeds=[0])
    assert np.array_equal(m.generate(PROMPTS[:1]), m.generate(PROMPTS[:1], **said))


def test_images_are_the_same_on_one_device(folder, m, monkeypatch):
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    one = dreamlite_jax.load_model(folder)
    assert (one._devices, m._devices) == (1, 8)
    one.encoder = m.encoder
    expected, images = (x.generate(PROMPTS[:1] * 8, steps=2, seeds=range(8)) for x in (m, one))
    np.testing.assert_allclose(images, expected, atol=1e-5)


def test_the_size_of_an_edit():
    config = dataclasses.replace(tiny.CONFIG, edit_size="source")  # multiples of 4, natively 16
    assert image_size(tiny.CONFIG, None, None, (31, 22)) == image_size(config, None, None) == (16, 16)
    assert image_size(config, None, None, (31, 22)) == (28, 20)
    assert image_size(config, 8, None, (31, 22)) == (8, 16)
    with pytest.raises(UserError, match="the source is 31x3 pixels, smaller than the 4 a side"):
        image_size(config, None, None, (31, 3))


def test_sources_of_many_sizes_are_no_batch(m, sources, monkeypatch):
    monkeypatch.setattr(m, "config", dataclasses.replace(m.config, edit_size="source"))
    assert m.generate(PROMPTS[:1], images=[sources[0].resize((13, 9))], steps=2).shape == (1, 8, 12, 3)
    with pytest.raises(UserError, match=r"the sources have 2 sizes \(12x8, 16x16…\) and a batch has one; give width"):
        m.generate(PROMPTS[:2], images=[sources[0].resize((13, 9)), sources[1]], steps=2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": ["  "]}, "prompt is empty"),
        ({"prompts": ["word " * 200]}, r"the prompt has 20\d tokens and the limit is 64"),
        ({"width": 21}, r"width 21 is not a positive multiple of 4 pixels; the nearest is 20"),
        ({"height": 0}, "height 0 is not a positive multiple of 4"),
        ({"steps": 0}, "steps is 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan; it must be a finite number"),
        ({"seeds": [1, 2]}, "2 seeds for 1 prompts"),
        ({"seeds": [-1]}, "seed -1 is out of range"),
        ({"images": []}, "0 images for 1 prompts"),
        ({"latents": np.zeros((1, 2, 2, 4))}, r"latents has shape \(1, 2, 2, 4\); .* need \(1, 4, 4, 4\)"),
    ],
)
def test_bad_input_is_named(m, unet_batches, options, says):
    with pytest.raises(UserError, match=says):
        m.generate(**{"prompts": PROMPTS[:1]} | options)
    assert not unet_batches


def test_a_workdir_is_as_good_as_its_model(folder, tmp_path):
    tiny_workdir = tmp_path / "run"
    tiny_workdir.mkdir()
    (tiny_workdir / "model").symlink_to(folder)
    assert dreamlite_jax.load_model(tiny_workdir).config == tiny.CONFIG


def test_what_is_no_model_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        dreamlite_jax.load_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"owner/name does not exist; if it is a repository on the hub: python -m conv"):
        dreamlite_jax.load_model("owner/name")
    with pytest.raises(UserError, match=r"is not a model folder: it lacks model.json"):
        dreamlite_jax.load_model(tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "pytorch_lora_weights.safetensors").touch()
    with pytest.raises(UserError, match=r"adapter is a LoRA, not a model; give the model it was trained on"):
        dreamlite_jax.load_model(tmp_path / "adapter")
    params = {"unet": tiny.unet_params(), "vae": tiny.vae_params()}
    broken = model_folder.save_model(tmp_path / "broken", tiny.CONFIG, params, {})
    weights = broken / "unet.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"unet.safetensors is truncated"):
        dreamlite_jax.load_model(broken)


def test_half_precision_is_near(folder, m):
    half = dreamlite_jax.load_model(folder, dtype=jax.numpy.bfloat16)
    half.encoder = m.encoder
    a, b = half.generate(PROMPTS[:1], guidance_scale=1.0), m.generate(PROMPTS[:1], guidance_scale=1.0)
    assert a.dtype == np.float32 and 0 < np.abs(a - b).max() < 0.1
