"""Pictures as the judges see them, against transformers' image processors and torch's resize."""

import jax
import numpy as np
import pytest
from PIL import Image
from reward_oracle import random_pictures, resized

from dreamlite_jax.errors import UserError
from dreamlite_jax.models.qwen_vl.vision import patchify
from dreamlite_jax.rewards.backbones import BACKBONES
from dreamlite_jax.rewards.images import CLIP_448, NATIVE

VISION = {name: config.vision for name, config in BACKBONES.items()}
SIZES = [(1024, 1024), (512, 512), (64, 64), (448, 448), (768, 1344), (1000, 500), (30, 90), (300, 17)]


@pytest.mark.parametrize("size", SIZES)
def test_sizes_equal_transformers(size):
    processing = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    bounds = {"min_pixels": 448**2, "max_pixels": 448**2}
    assert CLIP_448.size(*size, VISION["qwen2_vl_7b"]) == processing.smart_resize(*size, factor=28, **bounds)
    bounds = {"min_pixels": 65536, "max_pixels": 16777216}
    assert NATIVE.size(*size, VISION["qwen3_vl_8b"]) == processing.smart_resize(*size, factor=32, **bounds)


def test_squares_become_448():
    assert CLIP_448.size(1024, 1024, VISION["qwen2_5_vl_7b"]) == (448, 448)
    assert NATIVE.size(512, 512, VISION["qwen3_vl_8b"]) == (512, 512)
    with pytest.raises(UserError, match="sides of more than 200"):
        CLIP_448.size(8, 2000, VISION["qwen2_vl_7b"])


def test_patches_equal_those_of_the_processor():
    """PIL rounds to 8 bits after each pass of resizing and we do not: about a level, in units of the deviation."""
    processing = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    picture = np.clip(np.round((random_pictures(1, 96, 160)[0] + 1) * 127.5), 0, 255).astype(np.uint8)
    size = CLIP_448.size(96, 160, VISION["qwen2_vl_7b"])
    resized = Image.fromarray(picture).resize(size[::-1], Image.Resampling.BICUBIC)
    expected = processing.Qwen2VLImageProcessorPil()(images=[resized], return_tensors="np")["pixel_values"]
    images = (picture.astype(np.float32) / 127.5 - 1.0)[None]
    patches = CLIP_448.patches(images, VISION["qwen2_vl_7b"])[0]
    assert patches.shape == expected.shape
    level = 1 / 255 / min(CLIP_448.std)
    assert np.abs(patches - expected).max() < 1.25 * level  # PIL rounds after each of its two passes
    assert np.abs(patches - expected).mean() < 0.35 * level
    assert np.abs(NATIVE.patches(images, VISION["qwen2_vl_7b"])[0][:1] - expected[:1]).max() > 10 * level


def test_resize_and_gradients_equal_torch():
    torch = pytest.importorskip("torch")
    images = random_pictures(1, 600, 520)
    vision = VISION["qwen2_vl_7b"]
    size = CLIP_448.size(600, 520, vision)
    leaf = torch.from_numpy(images).requires_grad_(True)
    normalised = (resized(leaf, size).permute(0, 2, 3, 1) - torch.tensor(CLIP_448.mean)) / torch.tensor(CLIP_448.std)
    expected = np.asarray(patchify(normalised.detach().numpy(), vision))
    weights = np.random.default_rng(0).standard_normal(expected.shape).astype(np.float32)
    got, pull = jax.vjp(jax.jit(lambda x: CLIP_448.patches(x, vision)), images)
    np.testing.assert_allclose(got, expected, atol=2e-4)  # a hundredth of a level of 8 bits
    # The gradient of the same weighted sum, with the weights laid out as pixels for torch.
    order = np.asarray(patchify(np.arange(normalised.numel(), dtype=np.float64).reshape(normalised.shape), vision))
    by_pixel = np.zeros(normalised.numel(), np.float32)
    np.add.at(by_pixel, order.astype(np.int64).reshape(-1), weights.reshape(-1))
    (normalised * torch.from_numpy(by_pixel.reshape(tuple(normalised.shape)))).sum().backward()
    gradient = leaf.grad.numpy()
    relative = np.linalg.norm(pull(weights)[0] - gradient) / np.linalg.norm(gradient)
    # Rounding may put a pixel on the other side of a clip: one such pixel of 600,000 is 1.3e-3.
    assert relative < 5e-3
    assert (gradient == 0).mean() > 0.01  # clipped pixels are part of the comparison
