"""One table of names: our flax tree paths against torch keys, for the U-Net and the autoencoder, and their layouts.

A row is a module. "#" stands for a list index; a torch name is ours with "/" as "." and "_#" as ".#" unless the row
says otherwise. The kind of module gives the leaves: `kernel` and `bias` of convolutions and linear layers, `scale` and
`bias` of norms, against torch's `weight` and `bias`. A name that no row matches is no name of ours.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

from dreamlite_jax.errors import UserError
from dreamlite_jax.tensor_files import Shape

AFFINE, NORM = "kernel", "scale"  # what torch calls weight


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of module: its path here, what its weight is here, its torch name, and a shift of its first index."""

    ours: str
    weight: str
    torch: str
    shift: int = 0  # torch's first index minus ours


def row(ours: str, weight: str, torch: str | None = None, shift: int = 0) -> Row:
    return Row(ours, weight, ours.replace("/", ".").replace("_#", ".#") if torch is None else torch, shift)


# --- the U-Net (diffusers DreamLiteUNetModel)

BLOCKS = ("down_blocks_#", "mid_block", "up_blocks_#")
IN_RES_BLOCK = {
    "norm1": NORM,
    "conv1": AFFINE,  # a standard convolution, or the two below
    "conv1/depthwise": AFFINE,
    "conv1/pointwise": AFFINE,
    "time_emb_proj": AFFINE,
    "norm2": NORM,
    "conv2": AFFINE,
    "conv2/depthwise": AFFINE,
    "conv2/pointwise": AFFINE,
    "conv_shortcut": AFFINE,
}
IN_ATTENTION = {
    "to_q": AFFINE, "to_k": AFFINE, "to_v": AFFINE, "to_out_#": AFFINE, "norm_q": NORM, "norm_k": NORM,
}  # fmt: skip
IN_TRANSFORMER_BLOCK = {
    "norm1": NORM,
    **{f"attn1/{name}": kind for name, kind in IN_ATTENTION.items()},
    "norm2": NORM,
    **{f"attn2/{name}": kind for name, kind in IN_ATTENTION.items()},
    "norm3": NORM,
    "ff/net_#/proj": AFFINE,
    "ff/net_#": AFFINE,
}
IN_TRANSFORMER = {
    "norm": NORM,
    "proj_in": AFFINE,
    **{f"transformer_blocks_#/{name}": kind for name, kind in IN_TRANSFORMER_BLOCK.items()},
    "proj_out": AFFINE,
}
UNET_ROWS = (
    row("conv_in", AFFINE),
    *(row(f"{name}/linear_{i}", AFFINE) for name in ("time_embedding", "add_embedding") for i in (1, 2)),
    row("encoder_hid_proj/proj_0", AFFINE, "encoder_hid_proj.0"),
    row("encoder_hid_proj/proj_1", NORM, "encoder_hid_proj.1"),
    *(row(f"{block}/resnets_#/{name}", kind) for block in BLOCKS for name, kind in IN_RES_BLOCK.items()),
    *(row(f"{block}/attentions_#/{name}", kind) for block in BLOCKS for name, kind in IN_TRANSFORMER.items()),
    row("down_blocks_#/downsamplers_#/conv", AFFINE),
    row("up_blocks_#/upsamplers_#/conv", AFFINE),
    row("conv_norm_out", NORM),
    row("conv_out", AFFINE),
)

# --- the autoencoder: diffusers AutoencoderTiny, and the two files of the original TAESD

VAE_ROWS = tuple(row(f"{half}/layers_#{inner}", AFFINE) for half in ("encoder", "decoder") for inner in ("", "/conv_#"))
TAESD_ENCODER_ROWS = (
    row("encoder/layers_#", AFFINE, "#"),
    row("encoder/layers_#/conv_#", AFFINE, "#.conv.#"),
)
# The original decoder counts the clamp of its input as layer 0.
TAESD_DECODER_ROWS = (
    row("decoder/layers_#", AFFINE, "#", shift=1),
    row("decoder/layers_#/conv_#", AFFINE, "#.conv.#", shift=1),
)


@dataclasses.dataclass(frozen=True)
class TorchTensor:
    """A parameter of ours as torch names and shapes it."""

    name: str
    shape: Shape


class NameTable:
    """Translates names of ours, by the rows of one format.

    Args:
        rows: modules; no two may match the same name.
        what: the format, for messages.
    """

    def __init__(self, rows: Sequence[Row], what: str):
        self.what = what
        self._rows = [(r, _pattern(r.ours)) for r in rows]

    def to_torch(self, path: str) -> str:
        """The torch key of a path of ours. Raises `UserError` when the format has no such tensor."""
        module, _, leaf = path.rpartition("/")
        for r, ours in self._rows:
            if leaf in (r.weight, "bias") and (match := ours.fullmatch(module)):
                name = _filled(r.torch, match.groups(), r.shift)
                return f"{name}.{'bias' if leaf == 'bias' else 'weight'}"
        raise UserError(f"parameter {path!r} has no name in {self.what}")

    def tensors(self, shapes: Mapping[str, Shape]) -> dict[str, TorchTensor]:
        """For every parameter of an architecture, by path, its torch name and shape."""
        return {path: TorchTensor(self.to_torch(path), torch_shape(path, shape)) for path, shape in shapes.items()}


def _pattern(name: str) -> re.Pattern[str]:
    """Matches a name with numbers where it has "#"; leading zeros are no list index."""
    return re.compile(r"(0|[1-9]\d*)".join(map(re.escape, name.split("#"))))


def _filled(name: str, indices: Sequence[str], shift: int) -> str:
    """`name` with its "#" replaced by the indices, the first of them shifted."""
    numbers = [int(index) for index in indices]
    if numbers:
        numbers[0] += shift
    parts = name.split("#")
    return parts[0] + "".join(f"{number}{part}" for number, part in zip(numbers, parts[1:], strict=True))


# --- layouts: ours HWIO (depthwise (h, w, 1, c)) and (in, out), torch's OIHW (depthwise (c, 1, h, w)) and (out, in)

_TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0)}
_TO_OURS = {4: (2, 3, 1, 0), 2: (1, 0)}


def torch_shape(path: str, shape: Shape) -> Shape:
    """Shape in torch of a parameter of ours."""
    return tuple(shape[axis] for axis in _TO_TORCH[len(shape)]) if _is_kernel(path) else tuple(shape)


def to_torch_layout(path: str, array: np.ndarray) -> np.ndarray:
    """A view of a parameter of ours with torch's order of axes."""
    return array.transpose(_TO_TORCH[array.ndim]) if _is_kernel(path) else array


def to_our_layout(path: str, array: np.ndarray) -> np.ndarray:
    """A view of a torch tensor with our order of axes; `path` is ours."""
    return array.transpose(_TO_OURS[array.ndim]) if _is_kernel(path) else array


def _is_kernel(path: str) -> bool:
    return path.rpartition("/")[2] == AFFINE


# --- the tables

UNET = NameTable(UNET_ROWS, "diffusers DreamLiteUNetModel")
VAE = NameTable(VAE_ROWS, "diffusers AutoencoderTiny")
TAESD_ENCODER = NameTable(TAESD_ENCODER_ROWS, "the original TAESD encoder")
TAESD_DECODER = NameTable(TAESD_DECODER_ROWS, "the original TAESD decoder")
TABLES = {"unet": UNET, "vae": VAE}
