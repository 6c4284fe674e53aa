"""Pictures in and out: reading what people pass, labelled grids, and the distance in decibels. No JAX here."""

import contextlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from dreamlite_jax import decoding
from dreamlite_jax.errors import UserError

READABLE = "PNG, JPEG and WebP work"
HEIC = (b"heic", b"heix", b"hevc", b"mif1", b"msf1")  # brands of phones' files that need a licensed decoder


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


def read_picture(
    given: str | Path | Image.Image, say: Callable[[str], None] | None = None, *, name: str | None = None
) -> Image.Image:
    """The picture of a file, or one that Pillow has opened, in RGB; see `decoding.decode`.

    Args:
      say: is told what had to be assumed, in one line that names the file; None: printed on stderr.
      name: of the file in what is said; default: `given`.

    Raises:
      UserError: missing, unreadable, smaller than 8 pixels a side or of values that have no known white.
    """
    is_open = isinstance(given, Image.Image)
    name = name or ("given" if is_open else str(given))
    say = say or (lambda note: print(f"note: {note}", file=sys.stderr))
    try:
        with contextlib.nullcontext(given) if is_open else Image.open(given) as opened:
            return decoding.decode(opened, lambda note: say(f"image {name} {note}"))
    except FileNotFoundError:
        raise UserError(f"image {name}: no such file") from None
    except decoding.Refused as error:
        raise UserError(f"image {name} {error}") from None
    except Image.DecompressionBombError:
        raise UserError(f"image {name} has more than {2 * Image.MAX_IMAGE_PIXELS} pixels; scale it down") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise UserError(f"image {name} cannot be read as a picture ({_why(given, error)}); {READABLE}") from None


def _why(path: str | Path, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        with Path(path).open("rb") as file:
            head = file.read(12)
        return "it is HEIC" if head[4:8] == b"ftyp" and head[8:] in HEIC else "it is of no kind that is known"
    return (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())


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
