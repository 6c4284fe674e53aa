"""Pictures as the judges see them, differentiably: resized, normalised by channel, cut into patches."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from dreamlite_jax.errors import UserError
from dreamlite_jax.models.qwen_vl.config import VisionTowerConfig
from dreamlite_jax.models.qwen_vl.vision import patchify
from dreamlite_jax.types import Array, Float, Image

MAX_RATIO = 200  # of the sides


@dataclasses.dataclass(frozen=True)
class PictureRule:
    """The area in pixels that a picture is brought into, and mean and deviation of its channels in 0..1."""

    min_px: int
    max_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def size(self, height: int, width: int, vision: VisionTowerConfig) -> tuple[int, int]:
        """Height and width that the judge sees (oracle: `smart_resize` of qwen-vl-utils).

        Both become multiples of a merged patch; where the area is outside the bounds, both shrink or grow by one
        factor first, and are rounded towards the inside.
        """
        unit = vision.patch_size * vision.spatial_merge_size
        if max(height, width) > MAX_RATIO * min(height, width):
            raise UserError(f"a picture of {width} x {height} has sides of more than {MAX_RATIO} : 1")
        rows, columns = (max(1, round(side / unit)) for side in (height, width))
        if rows * columns * unit**2 > self.max_px:
            shrink = math.sqrt(height * width / self.max_px)
            rows, columns = (max(1, math.floor(side / shrink / unit)) for side in (height, width))
        elif rows * columns * unit**2 < self.min_px:
            grow = math.sqrt(self.min_px / (height * width))
            rows, columns = (math.ceil(side * grow / unit) for side in (height, width))
        return rows * unit, columns * unit

    def patches(self, images: Image, vision: VisionTowerConfig) -> Float[Array, "b n p"]:
        """Patches of pictures in [-1, 1]; beyond is clipped, as it is when they are shown.

        Bicubic with antialiasing in the manner of PIL, without its rounding to 8 bits.
        """
        batch, height, width, channels = images.shape
        size = self.size(height, width, vision)
        pixels = jnp.clip((images.astype(jnp.float32) + 1.0) / 2.0, 0.0, 1.0)
        for shape in ((height, size[1]), size):  # columns, then rows; bicubic overshoots at edges, and PIL clips twice
            if pixels.shape[1:3] != shape:
                pixels = jax.image.resize(pixels, (batch, *shape, channels), "cubic", antialias=True)
                pixels = jnp.clip(pixels, 0.0, 1.0)
        return patchify((pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32), vision)


# Qwen2-VL and Qwen2.5-VL: CLIP's statistics, and the area that both rewards were trained with.
CLIP_448 = PictureRule(
    448**2, 448**2, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
)  # fmt: skip
# Qwen3-VL as its processor comes: the released code asks for 448² too, but that processor does not hear it.
NATIVE = PictureRule(256**2, 4096**2, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
