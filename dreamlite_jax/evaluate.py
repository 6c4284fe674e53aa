"""Scores a model: python -m dreamlite_jax.evaluate [--model DIR] --benchmark sprites --output DIR [--split SPLIT …]."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from dreamlite_jax import cli
from dreamlite_jax.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.documented("dreamlite_jax.evaluate", __doc__)
    cli.add_model(parser)
    parser.add_argument("--benchmark", required=True, choices=["sprites"])
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--split", nargs="+", default=["validation"], choices=["validation", "heldout"])
    parser.add_argument("--task", nargs="+", default=["generate", "edit"], choices=["generate", "edit"])
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--draws", type=int, default=1, help="pictures of each item; several: their spread is reported")
    parser.add_argument("--steps", type=int, help="default: 12, or the model's own where it was made for fewer")
    parser.add_argument("--guidance_scale", type=float, help="default: the model's own; 1 (for edits both at 1): none")
    parser.add_argument("--image_guidance_scale", type=float, help="default: the model's own")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if args.items < 8:
        raise UserError(f"--items is {args.items}; retrieval among 8 needs at least 8")
    if args.draws < 1:
        raise UserError(f"--draws is {args.draws}; it must be at least 1")
    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps is {args.steps}; it must be at least 1")
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise UserError(f"--output {args.output} is not an empty folder; choose another")
    cli.check_writable("--output", args.output)

    from dreamlite_jax import load_model
    from dreamlite_jax.evals import floors
    from dreamlite_jax.evals.sprites import Protocol, evaluate
    from dreamlite_jax.model_folder import new_folder

    model = load_model(args.model)
    given = {name: getattr(args, name) for name in ("guidance_scale", "image_guidance_scale")}
    given = {name: value for name, value in given.items() if value is not None}
    model.config = dataclasses.replace(model.config, **given)
    steps = min(12, model.config.steps) if args.steps is None else args.steps
    with new_folder(args.output) as folder:
        report = {
            split: evaluate(model, Protocol(split, args.items, steps, draws=args.draws), tuple(args.task), folder)
            for split in args.split
        }
        for scores in report.values():
            scores["model"] = cli.model_name(args.model)
        (folder / "report.json").write_text(json.dumps(report, indent=1))
    for split, scores in report.items():
        print(f"{scores['model']}, {split}: {scores['protocol']}")
        for task in args.task:
            spread = {name: f" ± {value:.3f}" for name, value in scores[task].get("spread", {}).items()}
            numbers = {name: value for name, value in scores[task].items() if isinstance(value, float)}
            print(f"  {task}: " + "  ".join(f"{k} {v:.3f}{spread.get(k, '')}" for k, v in numbers.items()))
            for line in floors.lines(scores[task]):
                print(f"    without a model, {line}")
    return 0


if __name__ == "__main__":
    cli.run(main)
