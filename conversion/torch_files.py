"""Checkpoints in the layouts of diffusers: which files hold which tensors, and the report of what was mapped."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dreamlite_jax.errors import UserError
from dreamlite_jax.json_files import write_json
from dreamlite_jax.tensor_files import Shape, Stored, open_tensors, shards, stored_tensors

from . import names, outputs, resources
from .names import TorchTensor

WEIGHTS = "diffusion_pytorch_model.safetensors"
# The index of shards, and the names of half-precision variants as the hub has them.
INDICES = (f"{WEIGHTS}.index.json", "diffusion_pytorch_model.safetensors.index.fp16.json")
SINGLE_FILES = (WEIGHTS, "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bf16.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# Folders of a pipeline that are carried as they are.
TEXT_PARTS = ("text_encoder", "tokenizer", "processor")

Checkpoint = Mapping[str, tuple[Path, Stored]]  # file and kind of each tensor, by torch name


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a component: the shards its index names, or the one file.

    Raises:
      UserError: there is none, an index has no map, or only pickled weights are there.
    """
    for index in (folder / name for name in INDICES):
        if index.is_file():
            return shards(index)
    for path in (folder / name for name in SINGLE_FILES):
        if path.is_file():
            return [path]
    refuse_pickles(folder)
    found = ", ".join(sorted(p.name for p in folder.glob("*.safetensors"))) or "no safetensors file"
    raise UserError(f"{folder} has no {WEIGHTS} (nor an index of shards); it has {found}")


def refuse_pickles(folder: Path) -> None:
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder} has pickled weights ({pickles[0]}), which can run code; save them as safetensors first"
        )


def checkpoint(files: Iterable[Path]) -> dict[str, tuple[Path, Stored]]:
    """All tensors of some files, values unread. Raises `UserError` for a damaged file, a name twice, or a LoRA."""
    found: dict[str, tuple[Path, Stored]] = {}
    for path in files:
        for name, stored in stored_tensors(path).items():
            if name in found:
                raise UserError(f"tensor {name!r} is both in {found[name][0].name} and in {path.name}")
            found[name] = (path, stored)
        refuse_lora(path, found)
    return found


def refuse_lora(path: Path, tensors: Iterable[str]) -> None:
    """Raises `UserError` when the tensors are those of a low-rank adapter."""
    lora = [name for name in tensors if "lora" in name.lower()]
    if lora:
        raise UserError(
            f"{path} is a LoRA, not a model: {len(lora)} of its tensors are adapters such as {lora[0]}; "
            "convert the model it was trained on, and apply the LoRA to that"
        )


@dataclasses.dataclass(frozen=True)
class Tensors:
    """A component's tensors between the two layouts; each is read when it is asked for.

    Attributes:
      torch: torch names and shapes, by our path.
      kinds: our shapes, and the dtypes, by our path.
      read: gives a tensor in our layout, by our path.
    """

    torch: Mapping[str, TorchTensor]
    kinds: Mapping[str, Stored]
    read: Callable[[str], np.ndarray]


def open_checkpoint(found: Checkpoint, wanted: Mapping[str, TorchTensor], shapes: Mapping[str, Shape]) -> Tensors:
    """The `wanted` tensors of torch files that have been checked; `shapes` are ours."""
    files = {path: open_tensors(path) for path in {found[tensor.name][0] for tensor in wanted.values()}}
    kinds = {path: Stored(shapes[path], found[tensor.name][1].dtype) for path, tensor in wanted.items()}

    def read(path: str) -> np.ndarray:
        name = wanted[path].name
        return names.to_our_layout(path, files[found[name][0]].get_tensor(name))

    return Tensors(wanted, kinds, read)


# --- what a conversion says of itself


def new_report(command: str, source: Path, flags: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "command": f"conversion.{command}",
        "flags": {name: None if value is None else str(value) for name, value in flags.items()},
        "source": str(source.resolve()),
        "components": {},
        "carried": [],
        "absent": {},
    }


def component_report(tensors: Tensors) -> dict[str, Any]:
    """What was mapped to what: one row a tensor, with dtype and both shapes; and sums."""
    kinds = tensors.kinds
    return {
        "tensors": len(kinds),
        "parameters": sum(kind.size for kind in kinds.values()),
        "bytes": sum(kind.bytes for kind in kinds.values()),
        "dtypes": sorted({kind.dtype for kind in kinds.values()}),
        "mapping": [
            {
                "ours": path,
                "torch": tensors.torch[path].name,
                "dtype": kind.dtype,
                "shape": list(kind.shape),
                "torch_shape": list(tensors.torch[path].shape),
            }
            for path, kind in kinds.items()
        ],
    }


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """report.json of a conversion, completed by versions and peak memory."""
    full = {**report, "versions": versions(), "peak_memory_bytes": resources.peak_memory_bytes()}
    write_json(folder / "report.json", full)


def versions() -> dict[str, str]:
    return outputs.versions("safetensors")


def summary(report: Mapping[str, Any]) -> str:
    """The report in a few lines, for the terminal."""
    lines = [
        f"{name}: {part['tensors']} tensors, {part['parameters']:,} parameters, {', '.join(part['dtypes'])}"
        for name, part in report["components"].items()
    ]
    lines += [f"{name}: carried as it is" for name in report["carried"]]
    lines += [f"{name}: not there; {why}" for name, why in report["absent"].items()]
    lines += report.get("notes", [])
    return "\n".join([*lines, f"{report['flags']['output']}: {report['seconds']:.1f} s"])
