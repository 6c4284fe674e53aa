"""Rotary positions: M-RoPE of the text towers, axial RoPE of the vision towers, and the positions they rotate by.

Functions that end in arrays of numpy run on the host: they depend on shapes and token ids, never on weights.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from dreamlite_jax.types import Array, Float, Int

Grid = tuple[int, int]  # patches of one image: rows, columns


def inverse_frequencies(width: int, theta: float) -> np.ndarray:
    """(width / 2,) float32 angular frequencies, from 1 down to about 1 / theta."""
    return (1.0 / theta ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))).astype(np.float32)


def mrope_axes(section: Sequence[int], interleaved: bool) -> np.ndarray:
    """(sum(section),) which of time 0, row 1, column 2 each rotary frequency follows.

    Qwen3-VL interleaves (t h w t h w … and t for what is left), so that every axis gets high and low frequencies;
    Qwen2-VL has one contiguous block an axis. Oracle: `Qwen3VLTextRotaryEmbedding`, `Qwen2VLRotaryEmbedding`.
    """
    if not interleaved:
        return np.repeat(np.arange(3), section)
    axes = np.zeros(sum(section), np.int64)
    for axis in (1, 2):
        axes[axis : 3 * section[axis] : 3] = axis
    return axes


def mrope(
    positions: Int[Array, "3 b s"], head_dim: int, theta: float, section: Sequence[int], interleaved: bool
) -> tuple[Float[Array, "b s f"], Float[Array, "b s f"]]:
    """Cosine and sine of the text tower's rotation, float32; f is half of head_dim."""
    followed = positions[mrope_axes(section, interleaved)]  # (f, b, s)
    angles = jnp.moveaxis(followed, 0, -1).astype(jnp.float32) * inverse_frequencies(head_dim, theta)
    return jnp.cos(angles), jnp.sin(angles)


def axial_rope(grid: Grid, merge: int, head_dim: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of the vision tower's rotation, (rows · columns, head_dim / 2) float32.

    The first half of the frequencies follows the row, the second the column. Oracle: `Qwen3VLVisionRotaryEmbedding`.
    """
    inverse = inverse_frequencies(head_dim // 2, theta)
    row, column = patch_order(grid, merge)
    angles = np.concatenate([row[:, None] * inverse, column[:, None] * inverse], -1).astype(np.float32)
    return np.cos(angles), np.sin(angles)


def rotate(
    x: Float[Array, "*b s k e"], cos: Float[Array, "*#b s f"], sin: Float[Array, "*#b s f"]
) -> Float[Array, "*b s k e"]:
    """Heads `x` turned by the angles, in the dtype of `cos`; coordinate i pairs with i + f, where f = e / 2."""
    first, second = jnp.split(x.astype(cos.dtype), 2, -1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


def patch_order(grid: Grid, merge: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every patch in the order the towers take them: merge x merge blocks one after another."""
    rows, columns = grid
    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")

    def in_blocks(x: np.ndarray) -> np.ndarray:
        return x.reshape(rows // merge, merge, columns // merge, merge).transpose(0, 2, 1, 3).reshape(-1)

    return in_blocks(row), in_blocks(column)


def window_slots(grid: Grid, merge: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Merged patches in the order of Qwen2.5-VL's attention windows, side x side of them each; the last ones padded.

    Returns:
      (windows · side², ) index of the merged patch in each slot, and whether there is one; slots without have index 0.
      Oracle: transformers `get_vision_window_index`, which leaves the empty slots out.
    """
    rows, columns = grid[0] // merge, grid[1] // merge
    padded = np.full((-(-rows // side) * side, -(-columns // side) * side), -1, np.int32)
    padded[:rows, :columns] = np.arange(rows * columns).reshape(rows, columns)
    slots = padded.reshape(padded.shape[0] // side, side, padded.shape[1] // side, side).transpose(0, 2, 1, 3)
    slots = slots.reshape(-1)
    return np.maximum(slots, 0), slots >= 0


def position_taps(grid: Grid, merge: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Bilinear resampling (corners aligned) of the side x side table of learned positions to a grid of patches.

    Returns:
      Indices into the flat table (n, 4) and their float32 weights (n, 4), in patch order. Oracle:
      transformers `get_vision_interpolation_indices_and_weights`.
    """

    def axis(index: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        source = index.astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
        low = np.floor(source).astype(np.int64)
        share = source - low.astype(np.float32)
        return np.stack([low, np.minimum(low + 1, side - 1)], -1), np.stack([1 - share, share], -1)

    row, column = patch_order(grid, merge)
    (rows, row_weights), (columns, column_weights) = axis(row, grid[0]), axis(column, grid[1])
    indices = (rows[:, :, None] * side + columns[:, None, :]).reshape(-1, 4)
    return indices, (row_weights[:, :, None] * column_weights[:, None, :]).reshape(-1, 4).astype(np.float32)


def text_positions(mask: np.ndarray) -> np.ndarray:
    """(3, b, s) int32 running positions of the kept tokens (mask 1), the same on all three axes; padding gets 0."""
    running = np.where(mask > 0, np.cumsum(mask > 0, -1) - 1, 0).astype(np.int32)
    return np.broadcast_to(running, (3, *running.shape)).copy()


def multimodal_positions(ids: np.ndarray, mask: np.ndarray, image_token: int, grid: Grid, merge: int = 2) -> np.ndarray:
    """(3, b, s) int32 time, row and column of every token; all images have the same grid of patches.

    Text advances all three axes by one. An image that begins at p has time p, rows p + row, columns p + column in
    merged patches, and the text after it continues at p plus the longer side. Oracle: `Qwen3VLModel.get_rope_index`.

    Raises:
      ValueError: a row's image tokens are not whole images.
    """
    rows, columns = grid[0] // merge, grid[1] // merge
    tokens = rows * columns
    positions = np.zeros((3, *ids.shape), np.int32)
    for sample, (row_ids, row_mask) in enumerate(zip(ids, mask, strict=True)):
        kept = np.nonzero(row_mask)[0]
        is_image = row_ids[kept] == image_token
        at, start = 0, 0  # index into kept, position on the axes
        while at < len(kept):
            if not is_image[at]:
                positions[:, sample, kept[at]] = start
                at, start = at + 1, start + 1
                continue
            if at + tokens > len(kept) or not is_image[at : at + tokens].all():
                raise ValueError(f"sample {sample}: an image must be {tokens} consecutive image tokens")
            where = kept[at : at + tokens]
            positions[0, sample, where] = start
            positions[1, sample, where] = start + np.repeat(np.arange(rows), columns)
            positions[2, sample, where] = start + np.tile(np.arange(columns), rows)
            at, start = at + tokens, start + max(rows, columns)
    return positions
