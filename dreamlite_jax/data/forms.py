"""What a batch holds, by what it is for: pictures alone, pictures to encode and generate from, or latents.

Each form makes the arrays of a batch and writes samples into their rows (`mixture.Form`).
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from dreamlite_jax.data import latents
from dreamlite_jax.data.buckets import Size
from dreamlite_jax.data.transforms import Item
from dreamlite_jax.text.encoder import PromptRequest

Batch = dict[str, np.ndarray]


def write_picture(target: np.ndarray, picture: np.ndarray) -> None:
    """Writes 0..255 as [-1, 1] into float32 `target`, to the bit as `pictures.to_float`."""
    np.divide(picture, np.float32(127.5), out=target)
    target -= np.float32(1.0)


class Images:
    """`image` (b, H, W, 3) float32 in [-1, 1]."""

    def __init__(self, sizes: Sequence[Size]):
        self.sizes = sizes

    def empty(self, bucket: int, rows: int) -> Batch:
        width, height = self.sizes[bucket]
        return {"image": np.empty((rows, height, width, 3), np.float32)}

    def fill(self, batch: Batch, row: int, item: Item) -> None:
        write_picture(batch["image"][row], item.target)


class Pairs:
    """As `latents.collate` without text, and with pictures `target_image` and `source_image` (b, H, W, 3) in [-1, 1]
    instead of latents. Those of `source_image` are zero where there is none.

    Args:
      downsampling: pixels per latent pixel, at whose scale `weight` is.
    """

    def __init__(self, sizes: Sequence[Size], downsampling: int):
        self.sizes, self.downsampling = sizes, downsampling

    def empty(self, bucket: int, rows: int) -> Batch:
        width, height = self.sizes[bucket]
        h, w = height // self.downsampling, width // self.downsampling
        return {
            "target_image": np.empty((rows, height, width, 3), np.float32),
            "source_image": np.empty((rows, height, width, 3), np.float32),
            "weight": np.empty((rows, h, w, 1), np.float32),
            "editing": np.empty(rows, np.float32),
            "size": np.tile(np.asarray([width, height], np.float32), (rows, 1)),
        }

    def fill(self, batch: Batch, row: int, item: Item) -> None:
        write_picture(batch["target_image"][row], item.target)
        batch["editing"][row] = item.source is not None
        batch["weight"][row] = 1.0
        if item.source is None:
            batch["source_image"][row] = 0.0
        else:
            write_picture(batch["source_image"][row], item.source)
            batch["weight"][row, ..., 0] = latents.region_weight(latents.pool(item.changed, self.downsampling))

    def request(self, item: Item) -> PromptRequest:
        return request_of(item)


def request_of(item: Item) -> PromptRequest:
    """The prompt of a sample; an edit's has its source, which some encoders look at."""
    return PromptRequest(item.task, item.text, None if item.source is None else Image.fromarray(item.source))


class Latents:
    """Collated examples of latents of several sizes.

    Args:
      shapes: (h, w, c) of each bucket. width: of a text state. null_tail: see `latents.collate`.
      extra: further fields of a row, for their shapes.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int, int]],
        text_length: int,
        width: int,
        null_tail: int = 0,
        extra: Batch | None = None,
    ):
        self.shapes, self.text_length, self.width = shapes, text_length, width
        self.null_tail, self.extra = null_tail, extra or {}

    def empty(self, bucket: int, rows: int) -> Batch:
        h, w, c = self.shapes[bucket]
        shapes = {
            "target": (h, w, c),
            "source": (h, w, c),
            "weight": (h, w, 1),
            "text": (self.text_length, self.width),
            "mask": (self.text_length,),
            "editing": (),
            "size": (2,),
        }
        if self.null_tail:
            shapes |= {"null_tail": (self.null_tail, self.width), "null_from": ()}
        extra = {name: np.empty((rows, *value.shape), value.dtype) for name, value in self.extra.items()}
        return {name: np.empty((rows, *shape), np.float32) for name, shape in shapes.items()} | extra

    def fill(self, batch: Batch, row: int, item: Batch) -> None:
        for name, value in item.items():
            batch[name][row] = value
