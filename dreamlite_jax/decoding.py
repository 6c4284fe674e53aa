"""Pictures as people have them, decoded to what the networks take: RGB, upright, 8 bits, sRGB. No JAX here.

Every door where a picture enters comes through `decode`. What cannot be known of it is refused in one line; what is
assumed is said. An embedded colour profile is converted from; a picture without one is read as sRGB.
"""

import functools
import io
import warnings
from collections.abc import Callable

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps

DECODING = 2  # grows with every change of the pixels that a file gives; what is made of pictures remembers it
LEAST_SIDE = 8  # px
SRGB_GAMMA = 0.45455
SRGB_CHROMATICITY = (0.3127, 0.329, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)  # white, red, green, blue as PNG has them
ADOBE_RGB = 2, 0xFFFF  # EXIF's ColorSpace of pictures that are not sRGB, as cameras write it
# What comes after the first picture of these is no frame: previews and depth of a photograph, layers of a drawing.
ONE_PICTURE = ("MPO", "PSD")
# Relative colours, and black to black: what photo editors do by default. Without it a print's black is grey.
INTENT = ImageCms.Intent.RELATIVE_COLORIMETRIC
FLAGS = ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.NOCACHE  # no cache: threads share a transform

Say = Callable[[str], None]

# Pillow warns from 89 million pixels, which phones pass, and refuses from twice as many.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class Refused(ValueError):
    """A picture that is whole, and yet cannot be used; the message goes on after "the picture "."""


def decode(opened: Image.Image, say: Say = lambda note: None) -> Image.Image:
    """The picture in RGB: EXIF rotation applied, colours converted to sRGB, transparency laid over white.

    Args:
      say: is told what had to be assumed; a note goes on after "the picture ", and is the same for all of its kind.

    Raises:
      Refused: a side is below 8 pixels, or it is unknown which of its values is white. Damaged files raise whatever
        Pillow does.
    """
    opened.load()
    if getattr(opened, "is_animated", False) and opened.format not in ONE_PICTURE:
        say("has several frames or pages; the first is taken")
    picture = ImageOps.exif_transpose(opened)
    if min(picture.size) < LEAST_SIDE:
        raise Refused(f"is {picture.width}x{picture.height} pixels; each side must be at least {LEAST_SIDE}")
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture = _eight_bits(picture, opened, say)
    picture, alpha = _split(picture)
    picture = _srgb(picture, opened, say)
    if alpha is not None:
        picture = Image.composite(picture, Image.new("RGB", picture.size, "white"), alpha)
    picture.info = {}  # decoded once more it must stay as it is
    return picture


def _split(picture: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colours, in a mode that colour profiles are made for, and alpha."""
    if picture.mode in ("L", "LA", "La") and "transparency" not in picture.info:
        wanted = "LA" if picture.mode != "L" else "L"
    elif picture.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in picture.info:
        wanted = "RGBA"
    else:
        wanted = {"1": "L", "CMYK": "CMYK", "LAB": "LAB"}.get(picture.mode, "RGB")
    picture = picture.convert({"La": "LA"}.get(picture.mode, wanted))
    if wanted == "LA":
        return picture.getchannel("L"), picture.getchannel("A")
    if wanted == "RGBA":
        return picture.convert("RGB"), picture.getchannel("A")
    return picture, None


def _eight_bits(picture: Image.Image, opened: Image.Image, say: Say) -> Image.Image:
    """Grey of more than 8 bits, by the value that is white in its kind of file."""
    values, tags = np.asarray(picture, np.float64), getattr(opened, "tag_v2", {})
    if picture.mode == "F":
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 1):  # not a number is neither
            raise Refused(
                f"has floating-point values from {low:g} to {high:g} (mode F); they must lie from 0, black, to 1, white"
            )
        say("has floating-point values; 0 is read as black and 1 as white")
        white = 1.0
    elif picture.mode != "I" or opened.format in ("PNG", "PPM"):  # Pillow scales a PPM of more than 8 bits to 16
        white = 2.0 ** tags.get(ExifTags.Base.BitsPerSample, (16,))[0] - 1
        if 0 < values.max() < white / 16:
            say("is grey of 16 bits and nowhere brighter than a sixteenth of white; it is read as it is, nearly black")
    else:
        raise Refused(
            f"has whole numbers from {values.min():.0f} to {values.max():.0f} of 32 bits (mode I), of which it is "
            "unknown what is white; save it with 8 or 16 bits"
        )
    if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:  # white is zero; of 8 bits Pillow turns it itself
        values = white - values
    return Image.fromarray(np.round(values / white * 255).astype(np.uint8))


def _srgb(picture: Image.Image, opened: Image.Image, say: Say) -> Image.Image:
    """RGB in sRGB of a picture in L, RGB, CMYK or LAB."""
    if picture.mode == "LAB":  # needs no profile, and has none that says more
        lab = ImageCms.createProfile("LAB")
        return ImageCms.profileToProfile(picture, lab, _SRGB, INTENT, "RGB")
    profile = opened.info.get("icc_profile")
    if profile:
        try:
            space = _space(profile)
            if space == "RGB" and picture.mode == "L":  # grey of RGB's own curve
                picture = picture.convert("RGB")
            if space == {"L": "GRAY"}.get(picture.mode, picture.mode):
                return _converter(profile, picture.mode)(picture)
            say("has a colour profile that is made for another kind of picture; the profile is ignored")
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            say("has a colour profile that is damaged; the profile is ignored")
    elif "icc_profile" in opened.info:
        say("has a colour profile that is damaged; the profile is ignored")
    else:
        _unprofiled(opened, say)
    if picture.mode == "CMYK":
        say("is CMYK without a usable colour profile; its inks are taken as plain complements of red, green and blue")
    return picture.convert("RGB")


def _unprofiled(opened: Image.Image, say: Say) -> None:
    """Says where a file without a profile tells in another way that it is not sRGB."""
    info = opened.info
    gamma, primaries = info.get("gamma"), info.get("chromaticity")
    if "srgb" not in info:
        if gamma and abs(gamma - SRGB_GAMMA) > 0.01:
            say("states a gamma other than sRGB's, but has no colour profile; it is read as sRGB")
        if primaries and max(abs(a - b) for a, b in zip(primaries, SRGB_CHROMATICITY, strict=True)) > 0.005:
            say("states primary colours other than sRGB's, but has no colour profile; it is read as sRGB")
    if opened.format in ("JPEG", "MPO", "TIFF"):
        exif = opened.getexif()
        named = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.ColorSpace)
        if named == ADOBE_RGB[0] or (
            named == ADOBE_RGB[1] and exif.get_ifd(ExifTags.IFD.Interop).get(ExifTags.Interop.InteropIndex) == "R03"
        ):
            say("is in Adobe RGB by its EXIF data, but has no colour profile; it is read as sRGB")


_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _space(profile: bytes) -> str:
    """The colour space of a profile, such as RGB, GRAY or CMYK."""
    return ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space.strip()


@functools.lru_cache(maxsize=16)
def _converter(profile: bytes, mode: str) -> Callable[[Image.Image], Image.Image]:
    """From a picture in the profile's colours, of mode L, RGB or CMYK, to RGB in sRGB."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    exact = FLAGS | ImageCms.Flags.NOOPTIMIZE  # without it linear grey is off by ten levels near black
    transform = ImageCms.buildTransform(source, _SRGB, mode, "RGB", INTENT, exact if mode == "L" else FLAGS)
    if mode == "L":
        ramp = ImageCms.applyTransform(Image.fromarray(np.arange(256, dtype=np.uint8)[None]), transform)
        curve = ramp.getchannel("G").tobytes()
        return lambda picture: picture.point(curve).convert("RGB")
    if mode == "RGB":
        levels = np.arange(0, 256, 15, dtype=np.uint8)
        probe = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(len(levels), -1, 3)
        found = np.asarray(ImageCms.applyTransform(Image.fromarray(probe), transform), np.int16)
        if np.abs(found - probe).max() <= 1:  # it is sRGB's: pixels stay as they are
            return lambda picture: picture
    return lambda picture: ImageCms.applyTransform(picture, transform)
