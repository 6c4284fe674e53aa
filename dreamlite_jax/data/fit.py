"""How pictures fit into their buckets: what is cut off, what is enlarged, and the limits that a source may set."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from dreamlite_jax.data.buckets import Size, nearest_bucket
from dreamlite_jax.data.config import SourceConfig
from dreamlite_jax.data.records import BadRecord

MUCH_CUT, MUCH_ENLARGED = 0.5, 2.0  # beyond which a summary warns


@dataclasses.dataclass(frozen=True)
class Fit:
    """Of pictures and their buckets, one row each.

    Attributes:
      cut: share of the picture's area that is cut off. enlarged: factor by which a side grows; at most 1: it shrinks.
      refused: whether it is beyond the source's limits.
    """

    bucket: np.ndarray
    cut: np.ndarray
    enlarged: np.ndarray
    refused: np.ndarray


def fit(sizes: Sequence[Size], pictures: np.ndarray, config: SourceConfig) -> Fit:
    """The fit of (n, 2) widths and heights in pixels, all above 0."""
    pictures = np.asarray(pictures, np.float64).reshape(-1, 2)
    bucket = nearest_bucket(sizes, pictures)
    wanted = np.asarray(sizes, np.float64)[bucket]
    scale = (pictures / wanted).min(1)  # pixels of the picture a pixel of the bucket
    cut = 1 - (wanted * scale[:, None]).prod(1) / pictures.prod(1)
    return Fit(bucket, cut, 1 / scale, (pictures.min(1) < config.least_side) | (cut > config.most_cut))


def check_limits(picture: Size, sizes: Sequence[Size], config: SourceConfig) -> int:
    """The bucket of a picture. Raises `BadRecord` where it is beyond the limits of its source."""
    if min(picture) < config.least_side:
        raise BadRecord(
            f"picture is {picture[0]}x{picture[1]} pixels, a side below the source's least_side {config.least_side}"
        )
    found = fit(sizes, np.asarray([picture]), config)
    width, height = sizes[bucket := int(found.bucket[0])]
    if found.refused[0]:
        raise BadRecord(
            f"picture is {picture[0]}x{picture[1]} pixels: {found.cut[0]:.0%} of it would be cut off for "
            f"{width}x{height}, and the source's most_cut is {config.most_cut:g}"
        )
    return bucket


def summary(
    sizes: Sequence[Size], pictures: np.ndarray, config: SourceConfig, name: Callable[[int], str], of: str = ""
) -> list[str]:
    """Lines that say what becomes of pictures.

    Args:
      pictures: (n, 2) widths and heights; 0 where one cannot be read. name: of a row.
      of: what they are a part of, such as "1000 of 20000 looked at".
    """
    where = f"{config.path} {config.name}".strip()
    readable = np.flatnonzero((pictures > 0).all(1))
    if not len(readable):
        return [f"{where}: none of {len(pictures)} pictures can be read"]
    found = fit(sizes, pictures[readable], config)
    kept = np.flatnonzero(~found.refused)
    counts = np.bincount(found.bucket[kept], minlength=len(sizes))
    shapes = ", ".join(f"{w}x{h} {n:,}" for (w, h), n in zip(sizes, counts.tolist(), strict=True) if n)
    left_out = [
        f"{number:,} {why}"
        for number, why in (
            (len(readable) - len(kept), f"beyond least_side {config.least_side} or most_cut {config.most_cut:g}"),
            (len(pictures) - len(readable), "unreadable"),
        )
        if number
    ]
    lines = [f"{where}: {of or f'{len(pictures):,} records'}: " + "; ".join([shapes or "no picture", *left_out])]
    if not len(kept):
        return lines
    cut, enlarged = found.cut[kept], found.enlarged[kept]
    parts = []
    if cut.max() > 0.0005:
        worst = name(int(readable[kept[cut.argmax()]]))
        parts.append(f"{cut.mean():.1%} cut off on average, at most {cut.max():.1%} ({worst})")
    if (larger := int((enlarged > 1).sum())) > 0:
        worst = name(int(readable[kept[enlarged.argmax()]]))
        parts.append(f"{larger:,} enlarged, at most {enlarged.max():.1f} times ({worst})")
    if parts:
        lines.append(f"{where}: {'; '.join(parts)}")
    much, tiny = int((cut > MUCH_CUT).sum()), int((enlarged > MUCH_ENLARGED).sum())
    if much or tiny:
        lines.append(
            f"{where}: warning: {much:,} lose more than half, {tiny:,} are enlarged more than twice; the source's "
            "most_cut (a share of the area) and least_side (pixels) would leave such pictures out"
        )
    return lines
