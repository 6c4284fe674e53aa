"""What both export commands share: arguments, sizes, the components a model can give, their weights, the report."""

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dreamlite_jax import cli, model_folder
from dreamlite_jax.config import ModelConfig

from . import litert, text_parts
from .graph import COMPONENTS, Sizes


def parser(module: str, text: str | None) -> argparse.ArgumentParser:
    """The arguments that every export takes; `text` is the module's docstring."""
    found = cli.documented(module, text)
    found.add_argument("--model", type=Path, required=True, help="model folder, or the workdir of a training run")
    found.add_argument("--output", type=Path, required=True, help="folder to write; it must not be in use")
    found.add_argument("--component", choices=(*COMPONENTS, "all"), default="all")
    found.add_argument("--height", type=int, help="pixels of one panel; default: the model's native size")
    found.add_argument("--width", type=int, help="likewise")
    found.add_argument("--text_length", type=int, help="tokens; default: the longest the model was trained with")
    found.add_argument("--batch", type=int, default=1, help="rows of a call; guidance branches can share one")
    return found


def sizes_of(args: argparse.Namespace, config: ModelConfig, **more: Any) -> Sizes:
    """The sizes that the arguments ask for; `UserError` where the model has no such graph."""
    sizes = Sizes(
        args.height or config.native_size,
        args.width or config.native_size,
        config.text.max_length if args.text_length is None else args.text_length,
        args.batch,
        **more,
    )
    sizes.check(config)
    return sizes


def components_of(args: argparse.Namespace, model: Path, config: ModelConfig) -> tuple[str, ...]:
    """The components asked for; "all" is every one that fits into a file: all but a text encoder of billions."""
    if args.component != "all":
        return (args.component,)
    size = text_parts.weight_bytes(model, config) if text_parts.present(model, config) else None
    if size is not None and size <= litert.LARGEST_FILE:
        return COMPONENTS
    why = "is not in the folder" if size is None else f"has {size / 1e9:.1f} GB of weights, too much for one file"
    print(
        f"text: {config.text.encoder} {why}; it stays outside: give the U-Net states that were computed elsewhere",
        file=sys.stderr,
    )
    return tuple(component for component in COMPONENTS if component != "text")


def load(component: str, model: Path, config: ModelConfig) -> tuple[dict[str, Any], Any]:
    """Parameters of a component's module, and the config of the text encoder for component "text"."""
    if component == "text":
        return text_parts.load(model, config)
    return model_folder.load_params(model, "unet" if component == "unet" else "vae"), None


def write_report(folder: Path, args: argparse.Namespace, packages: Sequence[str], report: dict[str, Any]) -> None:
    """report.json: what was found, the arguments, and the versions of what shapes a file."""
    report["flags"] = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", *packages, "numpy")}
    report["versions"] = {"python": sys.version.split()[0], **versions}
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")


def conclude(args: argparse.Namespace, table: str, passed: bool) -> int:
    """Prints the table and the verdict; the exit code of the command."""
    print(table)
    print(f"{args.output}: {'all floors reached' if passed else 'A FLOOR WAS MISSED, see report.json'}")
    return 0 if passed else 1
