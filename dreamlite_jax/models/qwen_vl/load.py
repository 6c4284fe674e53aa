"""Weights of a Qwen vision-language model from a transformers folder: `config.json` beside its safetensors files."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from dreamlite_jax import tensor_files
from dreamlite_jax.errors import UserError
from dreamlite_jax.json_files import read_json
from dreamlite_jax.models.qwen_vl.config import QwenVLConfig, from_transformers
from dreamlite_jax.models.qwen_vl.model import STACKED, QwenVL, abstract_params, param_shardings
from dreamlite_jax.tensor_files import Stored

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Next-token logits, and the norm before them: an encoder stops earlier, unless it asks for the norm (`final_norm`).
UNUSED = ("lm_head.weight", "language_model.norm.weight")

LeafPath = tuple[str, ...]  # of a leaf in our parameter tree
NameOf = Callable[[LeafPath, int | None], str]  # of a leaf, and of which layer of it, in the checkpoint


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
    final_norm: bool = True,
) -> tuple[QwenVL, Any]:
    """Model and parameters of a transformers folder of Qwen2-VL, Qwen2.5-VL or Qwen3-VL; config.json has the sizes.

    Args:
      dtype: of the computation.
      param_dtype: of the parameters in memory; None: as `dtype`.
      mesh: with axes (data, fsdp): parameters are split over fsdp as they are read, activations pinned to data.
      final_norm: see `TextTowerConfig`.

    Raises:
      UserError: a file is missing, truncated or of another kind, or a tensor is missing, unknown, of another shape or
        no float; the message names it, and for a name the nearest one.
    """
    folder = Path(folder)
    sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    config = read_config(folder, final_norm)
    model = QwenVL(config, dtype, dtype if param_dtype is None else param_dtype, remat, sharding)
    shapes = abstract_params(model)
    placement = None if mesh is None else param_shardings(shapes, mesh)
    return model, load_params(folder, shapes, model.config, placement)


def read_config(folder: str | Path, final_norm: bool = True) -> QwenVLConfig:
    """The architecture in a folder's config.json, with the choice that it does not hold."""
    path = Path(folder) / "config.json"
    config = from_transformers(read_json(path), str(path))
    return dataclasses.replace(config, text=dataclasses.replace(config.text, final_norm=final_norm))


def load_params(
    source: Path, shapes: Any, config: QwenVLConfig, shardings: Any = None, name: NameOf | None = None
) -> Any:
    """Arrays for a tree of shapes (`abstract_params`), read leaf by leaf and put on the devices as `shardings` say.

    Args:
      source: a folder of weight files, or one file.
      name: of leaves in the checkpoint; None: as transformers calls those of the towers.
    """
    slots = expected_tensors(shapes, config, name)
    places = stored_tensors(source)
    check_tensors(source, slots, places)
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
            with tensor_files.open_tensors(places[name].file) as file:
                target[...] = to_ours(key, file.get_tensor(places[name].name))
        arrays.append(jax.device_put(value, placement))
    return jax.tree.unflatten(tree, arrays)


def keys(path: tuple) -> LeafPath:
    """Names along a tree path of JAX."""
    return tuple(key.key for key in path)


# --- names and layouts: ours (kernel (in, out), stacked layers) against torch's (weight (out, in), one tensor a layer)


def expected_tensors(shapes: Any, config: QwenVLConfig, name: NameOf | None = None) -> dict[str, Slot]:
    """Every tensor a checkpoint of this config holds, under its `short_name`; `name` as in `load_params`."""
    slots = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]:
        key = keys(path)
        stacked = any(part in STACKED for part in key)
        for layer in range(leaf.shape[0]) if stacked else (None,):
            shape = torch_shape(key, leaf.shape[1:] if stacked else leaf.shape, config)
            slots[(name or torch_name)(key, layer)] = Slot(key, layer, shape)
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
class Place:
    """Where a tensor of the checkpoint is; `name` is its full name in the file."""

    file: Path
    name: str
    stored: Stored


def short_name(name: str) -> str:
    """A tensor's name in the layout of transformers 5, without its leading "model.".

    Before 4.52 the towers were called "visual" and "model", and files have kept those names.
    """
    short = name.removeprefix("model.")
    return f"language_model.{short}" if short.split(".")[0] in ("embed_tokens", "layers", "norm") else short


def stored_tensors(source: Path) -> dict[str, Place]:
    """All tensors of a folder's weight files, or of one file, without reading their values, by their `short_name`."""
    found: dict[str, Place] = {}
    for path in weight_files(source):
        for name, stored in tensor_files.stored_tensors(path).items():
            short = short_name(name)
            if short in found:
                raise UserError(f"tensor {name!r} is both in {found[short].file.name} and in {path.name} of {source}")
            found[short] = Place(path, name, stored)
    return found


def weight_files(source: Path) -> list[Path]:
    """The safetensors files of a folder: the shards its index names, or the single file. A file stands for itself."""
    if source.is_file():
        return [source]
    if (source / INDEX).is_file():
        return tensor_files.shards(source / INDEX)
    if not (source / SINGLE).is_file():
        beside = ", ".join(sorted(p.name for p in source.glob("*.safetensors"))) or "no safetensors file"
        raise UserError(f"{source / SINGLE} does not exist; the folder has {beside}")
    return [source / SINGLE]


def check_tensors(folder: Path, slots: Mapping[str, Slot], places: Mapping[str, Place]) -> None:
    """Raises a `UserError` that names the first tensors that are missing, unknown, of another shape or no float."""
    found = {name: place.stored for name, place in places.items() if name in slots or name not in UNUSED}
    where = f"the weights in {folder} do not fit its config.json"
    tensor_files.check_tensors(where, {name: slot.shape for name, slot in slots.items()}, found)
