"""Weights in one byte each: int8 with a scale an output channel, stored as NAME and NAME:scale.

A quarter of float32, for models that are shipped. Who reads a file with `open_weights` sees float32 tensors under their
own names; vectors (biases, norms) stay as they are. Rounding is half a step of 1/127 of a channel's largest weight.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from dreamlite_jax.errors import UserError
from dreamlite_jax.tensor_files import Stored, TensorFile, open_tensors, stored_tensors

SCALE = ":scale"
LARGEST = 127


def pack(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors to store instead of these: kernels, whose last axis is their output channel, as int8 and scales.

    Raises:
      UserError: a weight is not a finite number.
    """
    packed: dict[str, np.ndarray] = {}
    for name, array in tensors.items():
        if array.ndim < 2:
            packed[name] = np.asarray(array, np.float32)
            continue
        scale = np.abs(array.astype(np.float32)).max(axis=tuple(range(array.ndim - 1))) / LARGEST
        if not np.isfinite(scale).all():
            raise UserError(f"{name} has weights that are no finite numbers; there is no model of one byte of it")
        scale = np.where(scale > 0, scale, np.float32(1))
        packed[name] = np.rint(array / scale).astype(np.int8)
        packed[name + SCALE] = scale
    return packed


def stored_weights(path: Path) -> dict[str, Stored]:
    """What `open_weights` gives: every tensor of a file, packed ones as float32. Raises `UserError` for a bad file."""
    raw = stored_tensors(path)
    scales = {name + SCALE: name for name, kind in raw.items() if is_packed(kind, raw.get(name + SCALE))}
    whole = {name: Stored(raw[name].shape, "F32") for name in scales.values()}
    return {name: whole.get(name, kind) for name, kind in raw.items() if name not in scales}


def is_packed(kind: Stored, scale: Stored | None) -> bool:
    return kind.dtype == "I8" and scale == Stored(kind.shape[-1:], "F32")


class Weights:
    """An opened file of weights."""

    def __init__(self, file: TensorFile):
        self._file = file

    def get_tensor(self, name: str) -> np.ndarray:
        """The tensor, by one of the names in `stored_weights`; `UserError` where it, or its scales, are not finite."""
        array = self._file.get_tensor(name)
        return array * self._file.get_tensor(name + SCALE) if array.dtype == np.int8 else array


@contextlib.contextmanager
def open_weights(path: Path) -> Iterator[Weights]:
    """A file's tensors, packed ones as float32. Raises `UserError` for a bad file."""
    with open_tensors(path) as file:
        yield Weights(file)
