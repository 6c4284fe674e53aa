"""The Python API on a random model: shapes and kinds, seeds, both tasks, and what it refuses."""

import dataclasses
import warnings

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

import dreamlite_jax
from dreamlite_jax import model, model_folder, pictures
from dreamlite_jax.config import image_size
from dreamlite_jax.errors import UserError
from dreamlite_jax.model import Generated
from dreamlite_jax.models.unet import UNet
from dreamlite_jax.models.vae import VAE
from dreamlite_jax.parallel import sharding
from dreamlite_jax.text.words import UnreadWords

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
        ({"seeds": [-1]}, r"seeds\[0\] is -1; it must be a whole number, from 0 to 4294967295"),
        ({"prompts": PROMPTS, "seeds": 7}, "seeds is 7; it must be a list of whole numbers, one for each prompt"),
        ({"prompts": "a cat", "seeds": []}, "0 seeds for 1 prompts"),
        ({"prompts": "a cat", "seeds": [1, "2"]}, r"seeds\[1\] is '2'; it must be a whole number"),
        ({"seeds": [0.5]}, r"seeds\[0\] is 0.5; it must be a whole number"),
        ({"prompts": 3}, "prompts is 3; it must be a list of texts"),
        ({"prompts": ["a cat", None]}, "prompt is None, a NoneType; it must be text"),
        ({"prompts": ["a\ud83d"]}, r"prompt is 'a\\ud83d'; its character 2 is no text"),
        ({"prompts": ["a cat", "🦋"]}, "knows none of the prompt's words: '🦋'"),
        ({"steps": 2.0}, "steps is 2.0; it must be a whole number, at least 1"),
        ({"steps": True}, "steps is True"),
        ({"width": "16"}, "width is '16'; it must be a whole number"),
        ({"guidance_scale": "2"}, "guidance_scale is '2'; it must be a finite number"),
        ({"image_guidance_scale": [1, 2]}, r"image_guidance_scale is \[1, 2\]; it must be a finite"),
        ({"batch_size": 0}, "batch_size is 0; it must be a whole number, at least 1"),
        ({"latents": np.full((1, 4, 4, 4), np.inf)}, "latents: 64 of 64 values are no finite numbers"),
        ({"latents": "noise"}, r"latents has shape \(\)"),
        (
            {"prompts": PROMPTS[:2], "images": [None, None]},
            r"images\[0\] is None; it must be a Pillow image, a path, or",
        ),
        ({"images": 7}, "images is 7; it must be a list of a Pillow image, a path"),
        ({"images": ["nowhere.png"]}, "nowhere.png: no such file"),
        ({"images": [np.zeros((16, 16), np.uint8)]}, r"images\[0\] is an array \(16, 16\) of uint8; it must be"),
        ({"images": np.zeros((1, 16, 16, 4), np.float32)}, r"images\[0\] is an array \(16, 16, 4\) of float32"),
        ({"images": [np.zeros((16, 16, 3), np.int64)]}, r"images\[0\] is an array \(16, 16, 3\) of int64"),
        ({"images": [np.full((16, 16, 3), 255.0)]}, r"images\[0\] has values up to 255; floats must be in \[-1, 1\]"),
        ({"images": [np.full((16, 16, 3), np.nan)]}, r"images\[0\]: 768 of 768 values are no finite numbers"),
        ({"images": [Image.new("RGB", (16, 3))]}, r"images\[0\] is 16x3 pixels; each side must be at least 8"),
        ({"images": []}, "0 images for 1 prompts"),
        ({"latents": np.zeros((1, 2, 2, 4))}, r"latents has shape \(1, 2, 2, 4\); .* need \(1, 4, 4, 4\)"),
    ],
)
def test_bad_input_is_named(m, unet_batches, options, says):
    with pytest.raises(UserError, match=says):
        m.generate(**{"prompts": PROMPTS[:1]} | options)
    assert not unet_batches


def test_a_text_alone_is_one_prompt(m):
    expected = m.generate([PROMPTS[1]] * 2, steps=2, seeds=[5, 7])
    assert np.array_equal(m.generate(PROMPTS[1], steps=2, seeds=[5, 7]), expected)
    alone = m.generate(PROMPTS[1], steps=2, seeds=7)
    assert alone.shape == (1, 16, 16, 3)
    np.testing.assert_allclose(alone[0], expected[1], atol=1e-5)
    assert np.array_equal(m.generate([PROMPTS[1]], steps=2, seeds=np.int64(7)), alone)
    assert np.array_equal(m.encode_prompts(PROMPTS[1]).states, m.encode_prompts([PROMPTS[1]]).states)


def test_a_source_is_given_in_many_forms(m, sources, tmp_path):
    expected = m.generate(PROMPTS[:2], images=sources[:1] * 2, steps=2)
    pixels = np.asarray(sources[0])
    sources[0].save(tmp_path / "source.png")
    floats = pictures.to_float(pixels)
    for given in (
        sources[0],
        str(tmp_path / "source.png"),
        tmp_path / "source.png",
        pixels,
        floats,
        jax.numpy.asarray(floats),
    ):
        assert np.array_equal(m.generate(PROMPTS[:2], images=given, steps=2), expected)
        assert np.array_equal(m.generate(PROMPTS[:2], images=[given, given], steps=2), expected)
    made = m.generate(PROMPTS[:2], steps=2)
    again = m.generate(PROMPTS[:2], images=made, steps=2)
    rounded = [Image.fromarray(image) for image in pictures.to_uint8(made)]
    assert np.array_equal(again, m.generate(PROMPTS[:2], images=rounded, steps=2))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sample": np.zeros((2, 4, 8, 3))}, r"sample has shape \(2, 4, 8, 3\); it must be \(b, h, w, c=4\)"),
        ({"sample": "canvas"}, r"sample is 'canvas'; it must be an array \(b, h, w, c\) of numbers"),
        ({"timestep": [1.0, 2.0, 3.0]}, r"timestep has shape \(3,\); it must be \(b=2\)"),
        ({"timestep": None}, r"timestep is None; it must be an array \(b\) of numbers"),
        ({"text": np.zeros((2, 5, 7))}, r"text has shape \(2, 5, 7\); it must be \(b=2, s, d=384\)"),
        ({"mask": np.ones((2, 4))}, r"mask has shape \(2, 4\); it must be \(b=2, s=5\)"),
        ({"time_ids": [[16, 16, 16]] * 2}, r"time_ids has shape \(2, 3\); it must be \(b=2, 2=2\)"),
    ],
)
def test_bad_arrays_of_velocity_are_named(m, change, says):
    given = dict(sample=np.zeros((2, 4, 8, 4)), timestep=1, text=np.zeros((2, 5, tiny.TEXT_DIM)), mask=np.ones((2, 5)))
    with pytest.raises(UserError, match=says):
        m.velocity(**{**given, "time_ids": [16, 16], **change})


def test_velocity_takes_what_is_the_same_for_all(m):
    rng = np.random.default_rng(0)
    sample, text = rng.normal(size=(2, 4, 8, 4)), rng.normal(size=(2, 5, tiny.TEXT_DIM))
    expected = m.velocity(sample, np.float32([500, 500]), text, np.ones((2, 5)), np.float32([[16, 16]] * 2))
    assert np.array_equal(m.velocity(sample, 500, text, [1] * 5, (16, 16)), expected)
    assert np.array_equal(m.velocity(sample, np.int32(500), text, np.ones((2, 5), bool), [[16, 16]] * 2), expected)


def test_what_is_called_inside_jax_stays_there(m):
    """Gradients by `jax.grad` beside differences of the function itself."""
    rng = np.random.default_rng(0)
    sample, text = rng.normal(size=(1, 4, 8, 4)), rng.normal(size=(1, 3, tiny.TEXT_DIM))
    image, latent = rng.uniform(-1, 1, (1, 16, 16, 3)), rng.normal(size=(1, 4, 4, 4))

    def at(x):
        return m.velocity(x, 500, text, np.ones((1, 3)), (16, 16))

    for function, x in ((at, sample), (m.encode_images, image), (m.decode_latents, latent)):
        x = np.asarray(x, np.float32)
        np.testing.assert_allclose(jax.jit(function)(x), function(x), atol=1e-5)
        gradient = jax.grad(lambda x, function=function: (function(x) ** 2).sum())(x)
        towards, step = rng.normal(size=x.shape).astype(np.float32), 1e-2
        ahead, behind = ((np.float64(function(x + sign * step * towards)) ** 2).sum() for sign in (1, -1))
        slope = (ahead - behind) / (2 * step)
        assert abs((gradient * towards).sum() - slope) < 0.03 * max(1, abs(slope))


def test_pictures_are_drawn_in_batches(m, unet_batches):
    """Five pictures, two at a time: one compilation, the last batch filled up, every picture its own."""
    prompts, steps, heard = PROMPTS[:1] * 2 + PROMPTS[1:2] * 3, 3, []
    options = dict(seeds=[5, 6, 7, 8, 9], steps=steps, width=24, guidance_scale=1.0)
    m.encoder.encode([])  # loaded
    batches = list(m.batches(prompts, batch_size=2, progress=lambda *told: heard.append(told), **options))
    assert [len(batch.images) for batch in batches] == [2, 2, 1]
    assert [batch.trajectory.shape[:2] for batch in batches] == [(3, 2), (3, 2), (3, 1)]
    assert unet_batches == [2]
    assert heard == [(i, 3 * steps) for i in range(1, 3 * steps + 1)]
    joined = m.run(prompts, batch_size=2, **options)
    for i, name in enumerate(Generated._fields):
        parts = [batch[i] for batch in batches]
        assert np.array_equal(getattr(joined, name), np.concatenate(parts, axis=int(name == "trajectory")))
    together = m.run(prompts, **options)
    np.testing.assert_allclose(joined.images, together.images, atol=1e-5)
    assert np.array_equal(pictures.to_uint8(joined.images), pictures.to_uint8(together.images))
    noise = np.random.default_rng(0).normal(size=(5, 4, 6, 4))
    given = dict(latents=noise, steps=1, width=24)
    np.testing.assert_allclose(m.generate(prompts, batch_size=2, **given), m.generate(prompts, **given), atol=1e-5)


def test_how_many_are_drawn_at_a_time(m, monkeypatch):
    assert m.usual_batch_size(1024, 1024) == m.usual_batch_size(2048, 1024) == 8  # devices
    assert m.usual_batch_size(512, 512) == 8 * 4 and m.usual_batch_size(16, 16) == 8 * 64
    monkeypatch.setattr(model, "BATCH_PIXELS", 1)
    sizes = [len(batch.images) for batch in m.batches("a cat", seeds=range(11), steps=1)]
    assert sizes == [8, 3]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 3.00 TiB for an array"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1099511627776 bytes."),
        jax.errors.JaxRuntimeError("INTERNAL: YNNPACK operation failed"),
    ],
)
def test_too_little_memory_is_one_line(m, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(m, "_sample", fail)
    says = (
        r"not enough memory for 2 pictures at a time of 32x16 pixels \(the model was trained for 16x16\); "
        "lower batch_size, or width and height"
    )
    with pytest.raises(UserError, match=says):
        m.generate(PROMPTS, width=32, batch_size=2)
    with pytest.raises(UserError, match=r"memory for a picture of 32x16 pixels .*; lower width and height$"):
        m.generate(PROMPTS[:1], width=32)
    monkeypatch.setattr(m, "_sample", lambda *a, **k: (_ for _ in ()).throw(jax.errors.JaxRuntimeError("INTERNAL: x")))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: x"):  # a defect stays one
        m.generate(PROMPTS[:1])


def spoilt(tree, factor):
    return jax.tree.map(lambda leaf: leaf * np.float32(factor), tree)


@pytest.mark.parametrize(
    ("begins", "unet", "vae", "editing"),
    [
        ("the U-Net's answer at step 1 of 2: 64 of 64 values", np.nan, 1, False),
        ("the U-Net's answer at step 1 of 2: ", 1e30, 1, False),  # finite weights, too large for what is computed
        ("the decoded picture: ", 1, 1e30, False),
        ("the source's latents: ", 1, 1e30, True),
    ],
)
def test_numbers_that_are_none_draw_nothing(sources, begins, unet, vae, editing):
    params = {"unet": spoilt(tiny.unet_params(), unet), "vae": spoilt(tiny.vae_params(), vae)}
    broken = model.Model(tiny.CONFIG, params, tiny.WordEncoder)
    with pytest.raises(UserError, match=begins):
        broken.generate(PROMPTS[:1], images=sources[0] if editing else None)


def test_states_that_are_no_numbers_draw_nothing(folder, monkeypatch):
    fresh = dreamlite_jax.load_model(folder)
    fresh.encoder = tiny.WordEncoder()
    monkeypatch.setattr(fresh.encoder, "state", lambda word: np.full(tiny.TEXT_DIM, np.nan, np.float32))
    with pytest.raises(UserError, match=r"the text encoder's answer: .* no finite numbers"):
        fresh.generate(PROMPTS[:1])


def test_words_without_a_token_are_warned_of(m):
    with pytest.warns(UnreadWords, match="does not know '🦋', so the picture is drawn without"):
        assert m.generate("a 🦋 on a hill", steps=1).shape == (1, 16, 16, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        m.generate("a butterfly on a hill", steps=1)


def test_a_workdir_is_as_good_as_its_model(folder, tmp_path):
    tiny_workdir = tmp_path / "run"
    tiny_workdir.mkdir()
    (tiny_workdir / "model").symlink_to(folder)
    assert dreamlite_jax.load_model(tiny_workdir).config == tiny.CONFIG


@pytest.mark.parametrize(("steps", "says"), [((4,), "of step 4"), ((100, 20, 3), "of steps 3, 20, 100"), ((), None)])
def test_a_run_that_has_not_exported_says_what_it_has(tmp_path, steps, says):
    for name in (*map(str, steps), "damaged", "8.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    says = f"checkpoints {says}" if says else "no checkpoint"
    for load in (dreamlite_jax.load_model, model.load_config):
        with pytest.raises(
            UserError, match=f"is a training run that has not exported a model yet, with {says}: the comm"
        ):
            load(tmp_path)


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
