"""What callers of `model.Model` may pass, in one form; what has none is a `UserError` that names the argument."""

import math
import numbers
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from dreamlite_jax import finite, pictures
from dreamlite_jax.errors import UserError

ROUNDING = 1e-3  # by which values of a picture may pass -1 and 1
PICTURE = "a Pillow image, a path, or an array (H, W, 3) of uint8 or of floats in [-1, 1]"


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """A whole number from `least` to `most`, of any library."""
    try:
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    if found is None or found < least or (most is not None and found > most):
        limit = f"at least {least}" if most is None else f"from {least} to {most}"
        raise UserError(f"{name} is {_shown(value)}; it must be a whole number, {limit}")
    return found


def number(name: str, value: Any) -> float:
    """A finite number."""
    try:
        found = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise UserError(f"{name} is {_shown(value)}; it must be a finite number")
    return found


def many(name: str, value: Any, of: str) -> list[Any]:
    """The items of a sequence, which text is not."""
    try:
        return list(value if not isinstance(value, str | bytes | Mapping) else None)  # type: ignore[arg-type]
    except TypeError:
        raise UserError(f"{name} is {_shown(value)}; it must be a list of {of}") from None


def prompts_and_seeds(prompts: Any, seeds: Any) -> tuple[list[Any], list[int]]:
    """A prompt and a seed for each picture. A text alone is one prompt, drawn once for each of its seeds."""
    alone = isinstance(prompts, str)
    prompts = [prompts] if alone else many("prompts", prompts, "texts")
    if not prompts:
        raise UserError("prompts is empty; it needs at least one")
    if _is_number(seeds) and len(prompts) == 1:
        seeds = [seeds]
    seeds = list(range(len(prompts))) if seeds is None else many("seeds", seeds, "whole numbers, one for each prompt")
    if alone and seeds:
        prompts = prompts * len(seeds)
    if len(seeds) != len(prompts):
        raise UserError(f"{len(seeds)} seeds for {len(prompts)} prompts; each image needs its own")
    return prompts, [whole(f"seeds[{i}]", seed, 0, 2**32 - 1) for i, seed in enumerate(seeds)]


def sources(images: Any, count: int) -> list[Image.Image]:
    """A picture in RGB for each of `count` prompts; a picture alone is the source of all."""
    alone = isinstance(images, str | Path | Image.Image) or getattr(images, "ndim", None) == 3
    images = [images] * count if alone else many("images", images, PICTURE)
    if len(images) != count:
        raise UserError(f"{len(images)} images for {count} prompts; each prompt needs its own")
    read: dict[int, Image.Image] = {}  # a picture that is given several times is read once
    for i, image in enumerate(images):
        if id(image) not in read:
            read[id(image)] = picture(f"images[{i}]", image)
    return [read[id(image)] for image in images]


def picture(name: str, image: Any) -> Image.Image:
    """An RGB picture of whatever `PICTURE` says."""
    if isinstance(image, str | Path):
        return pictures.read_picture(image)
    if isinstance(image, Image.Image):
        return pictures.read_picture(image, name=name)
    if not isinstance(image, np.ndarray | jax.Array):
        raise UserError(f"{name} is {_shown(image)}; it must be {PICTURE}")
    pixels = np.asarray(image)
    floats = jnp.issubdtype(pixels.dtype, jnp.floating)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size or not (floats or pixels.dtype == np.uint8):
        raise UserError(f"{name} is an array {pixels.shape} of {pixels.dtype}; it must be {PICTURE}")
    if floats:
        if fault := finite.fault(pixels):
            raise UserError(f"{name}: {fault}")
        if (largest := float(np.abs(pixels.astype(np.float32)).max())) > 1 + ROUNDING:
            raise UserError(f"{name} has values up to {largest:g}; floats must be in [-1, 1], 0 to 255 are for uint8")
        pixels = pictures.to_uint8(pixels)
    return pictures.read_picture(Image.fromarray(pixels), name=name)


def tensor(name: str, value: Any, shape: str, sizes: dict[str, int]) -> jax.Array:
    """A float32 array, possibly one that JAX is tracing, of shape such as "b h w c".

    Args:
      sizes: of the letters that are known; those that are met first become known.
    """
    return _of_shape(name, _array(name, value, shape), shape, sizes)


def rows(name: str, value: Any, shape: str, sizes: dict[str, int]) -> jax.Array:
    """A `tensor`; of what lacks the first axis, every row is the same."""
    array, (first, *rest) = _array(name, value, shape), shape.split()
    if array.ndim == len(rest):
        return jnp.broadcast_to(_of_shape(name, array, " ".join(rest), sizes), (sizes[first], *array.shape))
    return _of_shape(name, array, shape, sizes)


def _array(name: str, value: Any, shape: str) -> jax.Array:
    try:
        if value is not None and not isinstance(value, str):
            return jnp.asarray(value, jnp.float32)
    except (TypeError, ValueError):
        pass
    raise UserError(f"{name} is {_shown(value)}; it must be an array ({', '.join(shape.split())}) of numbers")


def _of_shape(name: str, array: jax.Array, shape: str, sizes: dict[str, int]) -> jax.Array:
    letters = shape.split()
    if array.ndim != len(letters) or any(sizes.get(key, n) != n for key, n in zip(letters, array.shape, strict=True)):
        wanted = ", ".join(f"{key}={sizes[key]}" if key in sizes else key for key in letters)
        raise UserError(f"{name} has shape {array.shape}; it must be ({wanted})")
    sizes.update(zip(letters, array.shape, strict=True))
    return array


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Number) or getattr(value, "ndim", None) == 0


def _shown(value: Any) -> str:
    """A value in a few words: itself where it is short, else its kind."""
    if isinstance(value, np.ndarray | jax.Array) and value.ndim:
        return f"an array {value.shape} of {value.dtype}"
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"
