"""Pictures in and out: reading what people pass, labelled grids, and the distance in decibels. No JAX here."""

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from dreamlite_jax.errors import UserError


def to_uint8(images: np.ndarray) -> np.ndarray:
    """[-1, 1] floats to 0..255."""
    return np.clip(np.round((np.asarray(images, np.float32) + 1.0) * 127.5), 0, 255).astype(np.uint8)


def to_float(images: np.ndarray) -> np.ndarray:
    """0..255 to [-1, 1] float32."""
    return np.asarray(images, np.float32) / 127.5 - 1.0


def psnr(a: np.ndarray, b: np.ndarray, value_range: float = 2.0) -> float:
    """Peak signal-to-noise ratio in dB; `value_range` is 2 for pictures in [-1, 1]. Equal pictures give inf."""
    error = float(np.square(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean())
    return math.inf if error == 0 else 10.0 * math.log10(value_range**2 / error)


class TooSmall(ValueError):
    """A picture with a side below 8 pixels; the message has its size."""


def read_picture(path: str | Path) -> Image.Image:
    """An RGB picture of a file, upright; see `upright`.

    Raises:
      UserError: missing, unreadable or smaller than 8 pixels a side.
    """
    try:
        with Image.open(path) as opened:
            return upright(opened)
    except FileNotFoundError:
        raise UserError(f"image {path}: no such file") from None
    except TooSmall as error:
        raise UserError(f"image {path} is {error}") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise UserError(f"image {path} cannot be read as a picture ({error}); PNG, JPEG and WebP work") from error


def upright(opened: Image.Image) -> Image.Image:
    """The picture decoded, RGB: EXIF rotation applied, transparency laid over white, grey and palette expanded.

    Raises:
      TooSmall: a side is below 8 pixels. Damaged files raise whatever Pillow does.
    """
    opened.load()
    picture = ImageOps.exif_transpose(opened)
    if min(picture.size) < 8:
        raise TooSmall(f"{picture.width}x{picture.height} pixels; each side must be at least 8")
    if picture.mode in ("I;16", "I;16B", "I;16L", "I"):
        picture = Image.fromarray((np.asarray(picture, np.float32) / 257.0).clip(0, 255).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        picture = Image.alpha_composite(white, rgba)
    return picture.convert("RGB")


def fit(picture: Image.Image, width: int, height: int) -> np.ndarray:
    """(height, width, 3) float32 in [-1, 1]: squashed to the size with LANCZOS, as the released pipeline does."""
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    return to_float(np.asarray(picture))


def grid(
    rows: Sequence[np.ndarray],
    *,
    row_titles: Sequence[str] = (),
    captions: Sequence[str] = (),
    cell: int = 128,
    title: str = "",
) -> np.ndarray:
    """Labelled grid, (H, W, 3) uint8: `rows` of (n, h, w, 3) uint8 under each other, a caption under each column."""
    font, pad, left = ImageFont.load_default(size=11), 4, 52 if row_titles else 4
    columns, lines = len(rows[0]), [_wrap(text, cell, font) for text in captions]
    text_height = 14 * max((len(x) for x in lines), default=0)
    top = 18 if title else pad
    height = top + len(rows) * (cell + pad) + text_height + pad
    sheet = Image.new("RGB", (left + columns * (cell + pad), height), "white")
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((pad, 2), title, fill="black", font=font)
    for r, row in enumerate(rows):
        y = top + r * (cell + pad)
        if row_titles:
            draw.text((pad, y + cell // 2 - 6), row_titles[r], fill="black", font=font)
        for c, image in enumerate(row):
            picture = Image.fromarray(image).resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(picture, (left + c * (cell + pad), y))
    for c, text in enumerate(lines):
        y = top + len(rows) * (cell + pad)
        draw.multiline_text((left + c * (cell + pad), y), "\n".join(text), fill="black", font=font, spacing=2)
    return np.asarray(sheet)


def stack(grids: Sequence[np.ndarray]) -> np.ndarray:
    """Grids under each other on white."""
    width = max(g.shape[1] for g in grids)
    padded = [np.pad(g, ((0, 8), (0, width - g.shape[1]), (0, 0)), constant_values=255) for g in grids]
    return np.concatenate(padded)


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and font.getlength(longer) > width - 2:
            lines.append(line)
            line = word
        else:
            line = longer
    return [*lines, line] if line else lines


def save_png(path: Path, image: np.ndarray, metadata: dict[str, str]) -> None:
    """Writes (H, W, 3) in [-1, 1] with text metadata; the file appears whole or not at all."""
    info = PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, value)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        Image.fromarray(to_uint8(image)).save(temporary, format="png", pnginfo=info)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path} cannot be written ({error.strerror or error}); choose a folder that can") from error
