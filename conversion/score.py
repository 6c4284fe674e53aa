"""Scores converted files on the embedded benchmark: python -m conversion.score --model LITERT_DIR [--against DIR].

The pictures come from the .tflite files by `conversion.runtime`, the judge is `dreamlite_jax.evals.sprites`. With
`--against` the float32 folder of the same model is scored on the same items, seeds and steps, and a retrieval or an
edit gain that is more than `--most_drop` points lower makes the exit code 1.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dreamlite_jax import cli
from dreamlite_jax.errors import UserError
from dreamlite_jax.evals import floors
from dreamlite_jax.json_files import write_json

from . import outputs
from .runtime import Runtime

SCORES = {"generate": ("retrieval_random", "retrieval_hard"), "edit": ("edit_gain",)}


class ConvertedModel:
    """A LiteRT folder with the part of `dreamlite_jax.model.Model` that a benchmark asks for."""

    def __init__(self, folder: Path, threads: int = 0):
        self.runtime = Runtime(folder, threads=threads, keep_loaded=True)
        self.config = self.runtime.config

    def generate(
        self,
        prompts: Sequence[str],
        *,
        images: Sequence[Image.Image] | None = None,
        steps: int,
        width: int,
        height: int,
        seeds: Sequence[int],
    ) -> np.ndarray:
        """Images (b, H, W, 3) in [-1, 1], clipped.

        Raises:
          UserError: another size than the files were converted for.
        """
        if (width, height) != (self.runtime.width, self.runtime.height):
            raise UserError(
                f"the benchmark's pictures are {width}x{height}, these files draw {self.runtime.width}x"
                f"{self.runtime.height}; convert with --width {width} --height {height}"
            )
        sources = images if images is not None else [None] * len(prompts)
        made = [
            self.runtime.generate(prompt, source, steps=steps, seed=seed)
            for prompt, source, seed in zip(prompts, sources, seeds, strict=True)
        ]
        return np.clip(np.stack(made), -1.0, 1.0)


def score(folder: Path, split: str, items: int, steps: int, threads: int = 0) -> dict[str, Any]:
    """What `sprites.evaluate` says of a LiteRT folder."""
    from dreamlite_jax.evals import sprites

    begin = time.perf_counter()
    model: Any = ConvertedModel(folder, threads)
    report = sprites.evaluate(model, sprites.Protocol(split, items, steps), tuple(SCORES))
    return {**report, "recipe": model.runtime.manifest["recipe"], "seconds": time.perf_counter() - begin}


def drops(found: dict[str, Any], against: dict[str, Any]) -> dict[str, float]:
    """Points (hundredths) by which each score is lower."""
    return {name: 100 * (against[task][name] - found[task][name]) for task, names in SCORES.items() for name in names}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.documented("conversion.score", __doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder written by conversion.to_litert")
    parser.add_argument("--against", type=Path, help="float32 folder of the same model")
    parser.add_argument("--split", choices=("validation", "heldout"), default="validation")
    parser.add_argument("--items", type=int, default=100, help="of each task")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--most_drop", type=float, default=3.0, help="points that a score may be lower")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--threads", type=int, default=0, help="0: one for each core")
    return parser.parse_args(sys.argv[1:] if argv is None else argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.items < 8:
        raise UserError(f"--items is {args.items}; retrieval among 8 needs at least 8")
    if args.steps < 1:
        raise UserError(f"--steps is {args.steps}; it must be at least 1")
    outputs.check_file(args.output)
    folders = [args.model, *([args.against] if args.against else [])]
    reports = [score(folder, args.split, args.items, args.steps, args.threads) for folder in folders]
    result: dict[str, Any] = {"model": reports[0]}
    if args.against:
        result |= {"against": reports[1], "drop_points": drops(*reports), "most_drop": args.most_drop}
    print(reports[0]["protocol"])
    for task, names in SCORES.items():
        for name in names:
            line = "   ".join(f"{report['recipe']} {report[task][name]:.3f}" for report in reports)
            print(f"{name:<18} {line}" + (f"   drop {drops(*reports)[name]:+.1f} points" if args.against else ""))
            print(f"{'':<18} without a model: {floors.beside(reports[0][task], name, '.3f')}")
    passed = not args.against or max(result["drop_points"].values()) <= args.most_drop
    if args.output:
        write_json(args.output, {**result, "passed": passed})
    if not passed:
        print(f"A SCORE DROPPED by more than {args.most_drop:g} points")
    return 0 if passed else 1


if __name__ == "__main__":
    cli.run(main)
