"""Pictures of a record as the network takes them: decoded, upright, RGB, resized and cropped to one bucket.

An edit's source, target and mask are cut alike, so that what lay on the same place still does. No JAX here.
"""

import dataclasses
import functools
import io
import sys
import threading

import numpy as np
from PIL import Image

from dreamlite_jax import decoding
from dreamlite_jax.data.buckets import Size
from dreamlite_jax.data.records import BadRecord, EncodedPicture, Record
from dreamlite_jax.text.templates import Task

SHRINK_LEFT = 2.0  # a JPEG is decoded at a reduced scale only while this factor remains for the resampling filter
SAME_SHAPE = 0.02  # the aspect ratios of an edit's pictures may differ by this share, which is rounding


@dataclasses.dataclass(frozen=True)
class Item:
    """One record, decoded and cut. Pictures are (H, W, 3) uint8.

    Attributes:
      changed: (H, W) bool where an edit changes the picture, else None.
    """

    id: str
    task: Task
    text: str
    target: np.ndarray
    source: np.ndarray | None
    changed: np.ndarray | None


def item(record: Record, size: Size, *, changed_levels: int) -> Item:
    """A record's pictures at `size` (width, height).

    Args:
      changed_levels: without a mask, pixels changed are those where a channel differs by more of 255 levels.

    Raises:
      BadRecord: a picture is damaged or too small, or an edit's pictures differ in shape.
    """
    target = open_picture(record.target, size, record.id)
    box = crop_box(target.size, size)
    cut_target = cut(target, box, size)
    if record.source is None:
        return Item(record.id, record.task, record.text, cut_target, None, None)
    source = cut(same_shape("source", open_picture(record.source, size, record.id), target), box, size)
    if record.mask is not None:
        mask = same_shape("mask", open_picture(record.mask, size, record.id), target).convert("L")
        changed = np.asarray(_resize(mask, box, size)) > 127
    else:
        changed = (np.abs(source.astype(np.int16) - cut_target) > changed_levels).any(-1)
    return Item(record.id, record.task, record.text, cut_target, source, changed)


def open_picture(encoded: EncodedPicture, at_least: Size | None = None, record: str = "") -> Image.Image:
    """A decoded picture, upright and RGB; see `decoding.decode`. What is assumed is said of the first of its kind.

    Args:
      at_least: (width, height) that will be cut from it: a much larger JPEG is decoded at 1/2, 1/4 or 1/8.
      record: that it is of, for what is said.

    Raises:
      BadRecord: it cannot be decoded, or a side is below 8 pixels.
    """
    say = functools.partial(_say_once, record)
    try:
        if isinstance(encoded, np.ndarray):
            return decoding.decode(_from_array(encoded), say)
        with Image.open(io.BytesIO(encoded)) as opened:
            if at_least and opened.format == "JPEG":
                side = int(SHRINK_LEFT * max(at_least))  # of both sides: which is width EXIF decides later
                opened.draft(None, (side, side))
            return decoding.decode(opened, say)
    except BadRecord:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise BadRecord(f"picture cannot be used ({' '.join(str(error).split())})") from None


_said: set[str] = set()
_saying = threading.Lock()


def _say_once(record: str, note: str) -> None:
    with _saying:
        if note not in _said:
            _said.add(note)
            print(f"note: a picture of record {record} {note} (so are others like it)", file=sys.stderr, flush=True)


def picture_size(encoded: EncodedPicture) -> Size:
    """(width, height) once upright, from the header alone. Raises `BadRecord` when that cannot be read."""
    try:
        if isinstance(encoded, np.ndarray):
            return _from_array(encoded).size
        with Image.open(io.BytesIO(encoded)) as opened:
            width, height = opened.size
            turned = opened.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # orientations that lie on their side
    except BadRecord:
        raise
    except Exception as error:
        raise BadRecord(f"picture cannot be used ({' '.join(str(error).split())})") from None
    return (height, width) if turned else (width, height)


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise BadRecord(f"picture is an array {array.shape} of {array.dtype}; it must be (H, W, 1, 3 or 4) of uint8")
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def crop_box(size: Size, bucket: Size) -> tuple[float, float, float, float]:
    """The largest central part of a picture of `size` with the bucket's aspect ratio: left, top, right, bottom as
    shares of its sides, so that it can be cut from every scale of the picture."""
    width, height = size
    scale = min(width / bucket[0], height / bucket[1])
    across, down = scale * bucket[0] / width, scale * bucket[1] / height
    return (1 - across) / 2, (1 - down) / 2, (1 + across) / 2, (1 + down) / 2


def cut(picture: Image.Image, box: tuple[float, float, float, float], size: Size) -> np.ndarray:
    """That part of the picture at `size`, (H, W, 3) uint8. A picture that fits as it is stays as it is."""
    return np.asarray(_resize(picture, box, size))


def _resize(picture: Image.Image, box: tuple[float, float, float, float], size: Size) -> Image.Image:
    if picture.size == tuple(size):
        return picture
    width, height = picture.size
    pixels = (box[0] * width, box[1] * height, box[2] * width, box[3] * height)
    return picture.resize(size, Image.Resampling.BICUBIC, pixels, reducing_gap=None)


def same_shape(name: str, picture: Image.Image, target: Image.Image) -> Image.Image:
    """The picture, if it has the target's aspect ratio."""
    ratio = picture.width / picture.height * target.height / target.width
    if abs(ratio - 1) > SAME_SHAPE:
        raise BadRecord(
            f"the {name} is {picture.width}x{picture.height} pixels and the target {target.width}x{target.height}; "
            "an edit's pictures must have one shape"
        )
    return picture
