"""Safetensors files, strictly: what is wrong with a file is said before anything is computed from it."""

import dataclasses
import difflib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file

from dreamlite_jax import finite
from dreamlite_jax.errors import UserError
from dreamlite_jax.json_files import read_json

SHOWN = 5  # tensors named in one error
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a tensor is, without its values."""

    shape: Shape
    dtype: str  # as safetensors spells it: F32, BF16, I64 …

    @classmethod
    def of(cls, array: np.ndarray) -> "Stored":
        """Of an array in memory."""
        spelled = {dtype: name for name, dtype in DTYPES.items()}
        return cls(array.shape, spelled.get(array.dtype, str(array.dtype)))

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.size * DTYPES[self.dtype].itemsize


def stored_tensors(path: Path) -> dict[str, Stored]:
    """Name, shape and dtype of every tensor in a file, without reading values. Raises `UserError` for a bad file."""
    with open_tensors(path) as file:
        return file.kinds()


def read_metadata(path: Path) -> dict[str, str]:
    """The text metadata in a file's header."""
    with open_tensors(path) as file:
        return file.metadata()


class TensorFile:
    """An opened file, also as a context manager. Whoever reads a tensor of it gets finite numbers."""

    def __init__(self, path: Path, file: Any):
        self.path, self._file = path, file

    def __enter__(self) -> "TensorFile":
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def kinds(self) -> dict[str, Stored]:
        """Of every tensor, values unread."""
        slices = {name: self._file.get_slice(name) for name in self.keys()}
        return {name: Stored(tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}

    def keys(self) -> list[str]:
        return list(self._file.keys())

    def metadata(self) -> dict[str, str]:
        return dict(self._file.metadata() or {})

    def get_tensor(self, name: str) -> np.ndarray:
        """Raises `UserError` where a value is NaN or infinite."""
        array = self._file.get_tensor(name)
        check_finite(str(self.path), name, array)
        return array


def check_finite(where: str, name: str, array: np.ndarray) -> None:
    """Raises `UserError` where a value of a tensor is NaN or infinite: nothing good comes of such a weight."""
    if fault := finite.fault(array):
        raise UserError(f"{where}: of {name} {fault}; fetch the file again, or take an earlier checkpoint")


def open_tensors(path: Path) -> TensorFile:
    """The opened file (a context manager); a `UserError` says whether it is absent, truncated or of another kind."""
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        return TensorFile(path, safetensors.safe_open(path, framework="np", backend="pread"))
    except safetensors.SafetensorError as error:
        size, promised = path.stat().st_size, promised_bytes(path)
        if promised is not None and size < promised:
            raise UserError(
                f"{path} is truncated: it has {size} bytes and its header promises {promised}; fetch it again"
            ) from None
        raise UserError(f"{path} ({size} bytes) is not a safetensors file: {error}") from None


def shards(index: Path) -> list[Path]:
    """The files that an index of shards names. Raises `UserError`: it names none, or one is not there."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise UserError(f"{index} has no weight_map; it must map each tensor to its file")
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise UserError(f"{index.parent} lacks {', '.join(missing)}, which {index.name} names; fetch it again")
    return files


def promised_bytes(path: Path) -> int | None:
    """Size that a header gives its file (at least, where the header itself is cut off); None: there is no header."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= 100_000_000:  # the format's own limit
            return None
        header = file.read(length)
    if not header.startswith(b"{"):
        return None
    if len(header) < length:
        return 8 + length
    try:
        entries = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError):
        return None
    return 8 + length + max(ends, default=0)


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a file atomically. Arrays need not be contiguous; the writer itself would silently misread those."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, temporary, dict(metadata or {}) or None)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_streamed(
    path: Path,
    kinds: Mapping[str, Stored],
    read: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file atomically with one tensor in memory at a time.

    Args:
      kinds: what each tensor is, by name; floats only.
      read: gives a tensor when it is its turn, of that kind; it need not be contiguous.
    """
    names = sorted(kinds, key=lambda name: (-DTYPES[kinds[name].dtype].itemsize, name))  # so that all are aligned
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        start, end = end, end + kinds[name].bytes
        header[name] = {"dtype": kinds[name].dtype, "shape": list(kinds[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns what follows
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                array = read(name)
                if Stored.of(array) != kinds[name]:
                    raise ValueError(f"{name} was to be {kinds[name]} and is {Stored.of(array)}")
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_tensors(where: str, expected: Mapping[str, Shape], found: Mapping[str, Stored]) -> None:
    """Compares names, shapes and kinds of a checkpoint with what the architecture asks for.

    Raises:
      UserError: names the first few tensors that are missing, unknown, misshapen or no float, with nearest matches.
    """
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    both = [name for name in expected if name in found]
    misshapen = [name for name in both if found[name].shape != tuple(expected[name])]
    other = [name for name in both if found[name].dtype not in DTYPES]
    faults = [f"{name} is missing{nearest(name, extra or found)}" for name in missing[:SHOWN]]
    faults += [
        f"{name} is not a tensor of this architecture{nearest(name, missing or expected)}" for name in extra[:SHOWN]
    ]
    faults += [f"{n} has shape {found[n].shape} and must have {tuple(expected[n])}" for n in misshapen[:SHOWN]]
    faults += [f"{n} is stored as {found[n].dtype}; it must be one of {', '.join(DTYPES)}" for n in other[:SHOWN]]
    if not faults:
        return
    count = len(missing) + len(extra) + len(misshapen) + len(other)
    many = ""
    if count > max(8, len(expected) // 5):
        many = f"this is a checkpoint of another architecture ({count} faults against {len(expected)} tensors): "
    rest = f"; and {count - len(faults)} more" if count > len(faults) else ""
    raise UserError(f"{where}: {many}{'; '.join(faults)}{rest}")


def nearest(name: str, candidates: Iterable[str]) -> str:
    """' (nearest: X)' for the candidate most like `name`, if any is."""
    near = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f" (nearest: {near[0]})" if near else ""


def sha256_of(files: Iterable[Path]) -> str:
    """The hexadecimal sha256 of files, one after the other; a `UserError` names one that does not exist."""
    digest = hashlib.sha256()
    for path in files:
        if not path.is_file():
            raise UserError(f"{path} does not exist")
        with path.open("rb") as file:
            while block := file.read(2**24):
                digest.update(block)
    return digest.hexdigest()
