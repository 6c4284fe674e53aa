"""What both export commands share: arguments, sizes, the components a model can give, their weights, what is written.

Before anything is loaded a command says what it will take of memory and disk, and refuses where there is less.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dreamlite_jax import cli, model_folder
from dreamlite_jax.config import ModelConfig, to_dict
from dreamlite_jax.errors import UserError
from dreamlite_jax.json_files import write_json
from dreamlite_jax.models.blocks import MASK_BIAS
from dreamlite_jax.text import templates

from . import outputs, resources, text_parts
from .graph import COMPONENTS, Sizes
from .runtime import FORMAT_VERSION, OWN_STATES

PEAK_PER_WEIGHT_BYTE = 4.0  # measured: 6.8 GB for the 1.56 GB U-Net, of which 0.5 GB are Python, JAX and the converter
PEAK_BASE_BYTES = 700_000_000


def parser(module: str, text: str | None) -> argparse.ArgumentParser:
    """The arguments that every export takes; `text` is the module's docstring."""
    found = cli.documented(module, text)
    found.add_argument("--model", type=Path, required=True, help="model folder, or the workdir of a training run")
    found.add_argument("--output", type=Path, required=True, help="folder to write; it must not be in use")
    found.add_argument("--replace", action="store_true", help="write even so; what was there is gone at the end")
    found.add_argument("--component", choices=(*COMPONENTS, "all"), default="all")
    found.add_argument("--height", type=int, help="pixels of one panel; default: the model's native size")
    found.add_argument("--width", type=int, help="likewise")
    found.add_argument("--text_length", type=int, help="tokens; default: the longest the model was trained with")
    found.add_argument("--batch", type=int, default=1, help="rows of a call; guidance branches can share one")
    return found


def sizes_of(args: argparse.Namespace, config: ModelConfig, **more: Any) -> Sizes:
    """The sizes that the arguments ask for; `UserError` where the model has no such graph."""
    sizes = Sizes(
        config.native_size if args.height is None else args.height,
        config.native_size if args.width is None else args.width,
        config.text.max_length if args.text_length is None else args.text_length,
        args.batch,
        **more,
    )
    sizes.check(config)
    return sizes


def components_of(
    args: argparse.Namespace, model: Path, config: ModelConfig, largest_file: float = math.inf
) -> tuple[str, ...]:
    """The components asked for; "all" leaves out a text encoder of billions that a file or the memory cannot hold."""
    if args.component != "all":
        return (args.component,)
    if text_parts.present(model, config):
        size, free = text_parts.weight_bytes(model, config), resources.available_memory()
        if size <= largest_file and (free is None or config.text.encoder == "minilm" or memory_bytes(size) <= free):
            return COMPONENTS
        place = "one file" if size > largest_file else f"{free / 1e9:.1f} GB of memory"
        why = f"has {size / 1e9:.1f} GB of weights, too much for {place}"
    else:
        why = "is not in the folder"
    print(f"text: {config.text.encoder} {why}; it stays outside: {OWN_STATES}", file=sys.stderr)
    return tuple(component for component in COMPONENTS if component != "text")


def weight_bytes(model: Path, config: ModelConfig, components: Sequence[str]) -> dict[str, int]:
    """Bytes of float32 weights of each component, read off the architecture.

    Raises:
      UserError: the model folder lacks a file that one of them needs.
    """
    sizes = {}
    for component in components:
        if component == "text":
            sizes[component] = text_parts.weight_bytes(model, config)
            continue
        part = "unet" if component == "unet" else "vae"
        file = model / model_folder.weight_file(part)
        if not file.is_file():
            raise UserError(f"model folder {model} lacks {file.name}, which {component} is made of")
        half = component.removeprefix("vae_") + "/" if part == "vae" else ""
        shapes = model_folder.expected_shapes(part, getattr(config, part))
        sizes[component] = 4 * sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(half))
    return sizes


def memory_bytes(weights: int) -> int:
    """Memory that converting a component takes at its peak, by the measured rule."""
    return int(PEAK_BASE_BYTES + PEAK_PER_WEIGHT_BYTE * weights)


def check_resources(
    weights: Mapping[str, int], output: Path, *, largest_file: float = math.inf, share: float = 1.0, extra: float = 0.0
) -> None:
    """Says what a conversion takes at its peak; raises `UserError` when the format or the machine cannot carry it.

    Args:
      weights: bytes of float32 weights of each component that is going to be converted, one after the other.
      output: where the files go; it need not exist yet.
      share: of the weights' bytes that the files take.
      extra: of the largest component's, on disk for a time.
    """
    largest = max(weights, key=weights.__getitem__)
    size = weights[largest]
    if size > largest_file:
        raise UserError(
            f"{largest} has {size / 1e9:.2f} GB of float32 weights; a file of this format holds at most "
            f"{largest_file / 1e9:.2f} GB"
        )
    memory = memory_bytes(size)
    disk = int(1.05 * (share * sum(weights.values()) + extra * size))
    resources.check_memory(f"converting {largest}", memory)
    resources.check_disk(disk, output)
    print(
        f"{sum(weights.values()) / 1e6:.0f} MB of weights; about {memory / 1e9:.1f} GB of memory and "
        f"{disk / 1e9:.1f} GB of disk at the peak",
        file=sys.stderr,
    )


def load(component: str, model: Path, config: ModelConfig) -> tuple[dict[str, Any], Any]:
    """Parameters of a component's module, and the config of the text encoder for component "text"."""
    if component == "text":
        return text_parts.load(model, config)
    return model_folder.load_params(model, "unet" if component == "unet" else "vae"), None


def write_manifest(
    model: Path, config: ModelConfig, sizes: Sizes, files: Mapping[str, str], folder: Path, **more: Any
) -> dict[str, Any]:
    """model.json, all that a runtime needs besides the files of the components, and the tokenizer beside it."""
    manifest = {
        "format_version": FORMAT_VERSION,
        "config": to_dict(config),
        "sizes": dataclasses.asdict(sizes),
        "files": dict(files),
        "templates": {"generate": templates.GENERATE_TAG, "edit": templates.EDIT_TAG, "null": ""},
        "mask_bias": MASK_BIAS,
        "start_noise": "threefry2x32 of key (0, seed), counter = index; see conversion/noise.py",
        **more,
    }
    if "text" in files:
        manifest |= text_parts.write_tokenizer(model, config, folder)
    write_json(folder / "model.json", manifest)
    return manifest


def write_report(folder: Path, args: argparse.Namespace, packages: Sequence[str], report: dict[str, Any]) -> None:
    """report.json: what was found, the arguments, the peak memory of the command, and what shapes a file."""
    report["flags"] = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
    report["peak_memory_bytes"] = resources.peak_memory_bytes()
    report["versions"] = outputs.versions(*packages)
    write_json(folder / "report.json", report)


def conclude(args: argparse.Namespace, table: str, report: Mapping[str, Any]) -> int:
    """Prints the table and the verdict; the exit code of the command."""
    print(table)
    print(f"peak memory, comparisons included: {report['peak_memory_bytes'] / 1e9:.2f} GB")
    print(f"{args.output}: {'all floors reached' if report['passed'] else 'A FLOOR WAS MISSED, see report.json'}")
    return 0 if report["passed"] else 1
