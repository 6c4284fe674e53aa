"""A model folder at a quarter of its size: python -m dreamlite_jax.compact --model DIR --output DIR.

Kernels become int8 with a scale an output channel (`dreamlite_jax.int8`); every command takes such a folder as it
takes any other and computes in float32. Printed are the bytes and how far the weights moved. What the pictures lose,
`dreamlite_jax.evaluate` says of both folders. For phones it is conversion.to_litert that makes models of 8 bits.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dreamlite_jax import cli, model_folder
from dreamlite_jax.errors import UserError


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = cli.documented("dreamlite_jax.compact", __doc__)
    parser.add_argument("--model", required=True, type=Path, help="model folder, or workdir of a training run")
    parser.add_argument("--output", required=True, type=Path, help="folder to write; new or empty, but for --replace")
    parser.add_argument("--replace", action="store_true", help="put the new model in the place of what is in --output")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    source = model_folder.find_model(args.model)
    config, provenance = model_folder.load_config(source), model_folder.load_provenance(source)
    if config.text.encoder != "minilm":
        raise UserError(
            f"--model {args.model} has the text encoder {config.text.encoder}, which stays as large as it is"
        )
    cli.check_writable("--output", args.output)
    params = {component: model_folder.load_params(source, component) for component in model_folder.COMPONENTS}
    provenance["compact"] = "kernels in int8 with a scale an output channel"
    model_folder.save_model(args.output, config, params, provenance, replace=args.replace, dtype=np.int8)
    for component, tree in params.items():
        name = model_folder.weight_file(component)
        before, after = ((folder / name).stat().st_size / 1e6 for folder in (source, args.output))
        moved = relative_error(tree, model_folder.load_params(args.output, component))
        print(f"{component}: {before:.2f} MB, now {after:.2f} MB; weights moved by {moved:.2%} of their length")
    return 0


def relative_error(before: model_folder.Tree, after: model_folder.Tree) -> float:
    """Length of the difference of two trees over the length of the first."""
    old, new = model_folder.flatten(before, np.float64), model_folder.flatten(after, np.float64)
    squared = sum(np.square(new[name] - tensor).sum() for name, tensor in old.items())
    return float(np.sqrt(squared / sum(np.square(tensor).sum() for tensor in old.values())))


if __name__ == "__main__":
    cli.run(main)
