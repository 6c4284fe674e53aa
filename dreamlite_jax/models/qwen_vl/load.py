"""Weights of Qwen3-VL from a transformers folder: `config.json` beside one safetensors file or several shards."""

import dataclasses
import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from dreamlite_jax.errors import UserError
from dreamlite_jax.models.qwen_vl.config import QwenVLConfig, from_transformers
from dreamlite_jax.models.qwen_vl.model import STACKED, QwenVL, abstract_params, param_shardings

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
UNUSED = ("lm_head.weight",)  # next-token logits; an encoder stops before them
FLOATS = ("BF16", "F16", "F32")
SHOWN = 5  # tensors named in one error

LeafPath = tuple[str, ...]  # of a leaf in our parameter tree


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a tensor of the checkpoint goes: a leaf of ours, and for stacked leaves which layer of it."""

    path: LeafPath
    layer: int | None
    shape: tuple[int, ...]  # as stored by torch


def load_qwen_vl(
    folder: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = None,
    remat: bool = False,
    mesh: Mesh | None = None,
) -> tuple[QwenVL, Any]:
    """Model and parameters of a transformers folder of Qwen3-VL (2B, 4B, 8B: the sizes are in its config.json).

    Args:
      dtype: of the computation.
      param_dtype: of the parameters in memory; None: as `dtype`.
      mesh: with axes (data, fsdp): parameters are split over fsdp as they are read, activations pinned to data.

    Raises:
      UserError: a file is missing, truncated or of another kind, or a tensor is missing, unknown, of another shape or
        no float; the message names it, and for a name the nearest one.
    """
    folder = Path(folder)
    sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    model = QwenVL(read_config(folder), dtype, dtype if param_dtype is None else param_dtype, remat, sharding)
    shapes = abstract_params(model)
    placement = None if mesh is None else param_shardings(shapes, mesh)
    return model, load_params(folder, shapes, model.config, placement)


def read_config(folder: str | Path) -> QwenVLConfig:
    """The architecture in a folder's config.json."""
    path = Path(folder) / "config.json"
    return from_transformers(read_json(path), str(path))


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object; a `UserError` names the file when it is missing or holds something else."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; it belongs to a transformers model folder")
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, Mapping):
        raise UserError(f"{path} holds a {type(value).__name__}; it must be an object")
    return value


def load_params(folder: Path, shapes: Any, config: QwenVLConfig, shardings: Any = None) -> Any:
    """Arrays for a tree of shapes (`abstract_params`), read leaf by leaf and put on the devices as `shardings` say."""
    slots = expected_tensors(shapes, config)
    stored = stored_tensors(folder)
    check_tensors(folder, slots, stored)
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    placements = [None] * len(leaves) if shardings is None else jax.tree.leaves(shardings)
    sources: dict[LeafPath, list[str]] = {}
    for name, slot in slots.items():  # in order of layers
        sources.setdefault(slot.path, []).append(name)

    arrays = []
    for (path, leaf), placement in zip(leaves, placements, strict=True):
        key = keys(path)
        value = np.empty(leaf.shape, leaf.dtype)
        for name in sources[key]:
            target = value if slots[name].layer is None else value[slots[name].layer]
            with open_safetensors(stored[name].file) as file:
                target[...] = to_ours(key, file.get_tensor(stored[name].name))
        arrays.append(jax.device_put(value, placement))
    return jax.tree.unflatten(tree, arrays)


def keys(path: tuple) -> LeafPath:
    """Names along a tree path of JAX."""
    return tuple(key.key for key in path)


# --- names and layouts: ours (kernel (in, out), stacked layers) against torch's (weight (out, in), one tensor a layer)


def expected_tensors(shapes: Any, config: QwenVLConfig) -> dict[str, Slot]:
    """Every tensor a checkpoint of this config holds, under the name transformers gives it (without "model.")."""
    slots = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]:
        key = keys(path)
        stacked = any(part in STACKED for part in key)
        for layer in range(leaf.shape[0]) if stacked else (None,):
            shape = torch_shape(key, leaf.shape[1:] if stacked else leaf.shape, config)
            slots[torch_name(key, layer)] = Slot(key, layer, shape)
    return slots


def torch_name(path: LeafPath, layer: int | None) -> str:
    """Dotted torch name of a leaf: list indices apart, `weight` for what we call kernel, scale or embedding."""
    parts = []
    for part in path[:-1]:
        stem, _, index = part.rpartition("_")
        parts += [stem, index] if index.isdigit() else [part]
        if part in STACKED:
            parts.append(str(layer))
    return ".".join([*parts, "bias" if path[-1] == "bias" else "weight"])


def torch_shape(path: LeafPath, shape: tuple[int, ...], config: QwenVLConfig) -> tuple[int, ...]:
    """Shape in the checkpoint of (one layer of) a leaf."""
    if path[-1] != "kernel":
        return tuple(shape)
    if "patch_embed" in path:  # a Conv3d there
        vision = config.vision
        return (shape[1], vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    return (shape[1], shape[0])


def to_ours(path: LeafPath, tensor: np.ndarray) -> np.ndarray:
    """A checkpoint tensor in our layout."""
    return tensor.reshape(tensor.shape[0], -1).T if path[-1] == "kernel" else tensor


# --- files


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor as the checkpoint's headers describe it; `name` is its full name in the file."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a folder's weight files, without reading their values, by name without a leading "model."."""
    found: dict[str, Stored] = {}
    for path in weight_files(folder):
        with open_safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                part = file.get_slice(name)
                short = name.removeprefix("model.")
                if short in found:
                    raise UserError(
                        f"tensor {name!r} is both in {found[short].file.name} and in {path.name} of {folder}"
                    )
                found[short] = Stored(path, name, tuple(part.get_shape()), part.get_dtype())
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: the shards its index names, or the single file."""
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, Mapping):
            raise UserError(f"{folder / INDEX} has no weight_map; it must map each tensor to its file")
        files = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        files = [folder / SINGLE]
    for path in files:
        if not path.is_file():
            beside = ", ".join(sorted(p.name for p in folder.glob("*.safetensors"))) or "no safetensors file"
            raise UserError(f"{path} does not exist; the folder has {beside}")
    return files


def open_safetensors(path: Path) -> Any:
    """The opened file; a `UserError` says whether it is truncated or of another kind."""
    try:
        return safetensors.safe_open(path, framework="np")
    except safetensors.SafetensorError as error:
        size, promised = path.stat().st_size, promised_bytes(path)
        if promised is not None and size < promised:
            raise UserError(
                f"{path} is truncated: it has {size} bytes and its header promises {promised}; fetch it again"
            ) from None
        raise UserError(f"{path} ({size} bytes) is not a safetensors file: {error}") from None


def promised_bytes(path: Path) -> int | None:
    """Size that a safetensors header gives its file (at least, where the header itself is cut); None: no header."""
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
        return 8 + length + max((e["data_offsets"][1] for k, e in entries.items() if k != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError):
        return None


# --- checks


def check_tensors(folder: Path, slots: Mapping[str, Slot], stored: Mapping[str, Stored]) -> None:
    """Raises a `UserError` that names the first tensors that are missing, unknown, of another shape or no float."""
    missing = [name for name in slots if name not in stored]
    extra = [name for name in stored if name not in slots and name not in UNUSED]
    problems = [f"{name} is missing{_nearest(name, extra or stored)}" for name in _first(missing)]
    problems += [f"{name} is unknown{_nearest(name, missing or slots)}" for name in _first(extra)]
    both = [name for name in slots if name in stored]
    shapes = [name for name in both if stored[name].shape != slots[name].shape]
    problems += [
        f"{name} has shape {stored[name].shape}; config.json asks for {slots[name].shape}" for name in _first(shapes)
    ]
    kinds = [name for name in both if stored[name].dtype not in FLOATS]
    problems += [f"{name} is stored as {stored[name].dtype}; it must be one of {FLOATS}" for name in _first(kinds)]
    if problems:
        total = len(missing) + len(extra) + len(shapes) + len(kinds)
        more = f" (and {total - len(problems)} more)" if total > len(problems) else ""
        raise UserError(
            f"the weights in {folder} do not fit its config.json: tensor " + "; tensor ".join(problems) + more
        )


def _first(names: Iterable[str]) -> Iterator[str]:
    return (name for name, _ in zip(names, range(SHOWN), strict=False))


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (nearest: {near[0]})" if near else ""
