"""Generates or edits: python -m dreamlite_jax.sample --model DIR --prompt TEXT [--image PNG] --output PNG."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from dreamlite_jax import cli
from dreamlite_jax.config import ModelConfig, check_image_size
from dreamlite_jax.errors import UserError


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = cli.Parser(prog="python -m dreamlite_jax.sample", description=__doc__)
    parser.add_argument(
        "--model", required=True, type=Path, help="model folder, workdir of a training run, or diffusers folder"
    )
    parser.add_argument("--prompt", required=True, help="what to draw, or with --image what to change")
    parser.add_argument("--image", type=Path, help="source of an edit")
    parser.add_argument("--output", required=True, type=Path, help="PNG; with several images a number is added")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance_scale", type=float, help="1 or less: none")
    parser.add_argument("--image_guidance_scale", type=float)
    parser.add_argument("--width", type=int)
    parser.add_argument("--height", type=int)
    parser.add_argument("--seed", type=int, default=0, help="of the first image; the next ones count up")
    parser.add_argument("--num_images", type=int, default=1)
    parser.add_argument("--preview", type=Path, help="folder for what is predicted at each step, images side by side")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Everything that can be wrong before the model is loaded."""
    from dreamlite_jax.model import load_config
    from dreamlite_jax.text.templates import clean_prompt

    clean_prompt("edit" if args.image else "generate", args.prompt)
    config = load_config(args.model)
    check_image_size(
        config,
        config.native_size if args.width is None else args.width,
        config.native_size if args.height is None else args.height,
    )
    for name, least in (("steps", 1), ("num_images", 1), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name} is {value}; it must be at least {least}")
    if args.output.suffix.lower() != ".png":
        raise UserError(f"--output {args.output} must end in .png: the settings are stored in the file as PNG metadata")
    if args.output.is_dir():
        raise UserError(f"--output {args.output} is a folder; name a file in it")
    if args.preview and args.preview.exists() and (not args.preview.is_dir() or any(args.preview.iterdir())):
        raise UserError(f"--preview {args.preview} is not an empty folder; choose another")
    cli.check_writable("--output", args.output.parent)
    if args.preview:
        cli.check_writable("--preview", args.preview)


def outputs(output: Path, count: int) -> list[Path]:
    """One path an image: the given one, or numbered ones."""
    return [output] if count == 1 else [output.with_stem(f"{output.stem}_{i:02d}") for i in range(count)]


class StepBar:
    """A bar of sampling steps on a terminal; silent where stderr is a file, so that logs stay readable."""

    width = 30

    def __init__(self, stream: TextIO | None = None):
        self._stream = sys.stderr if stream is None else stream
        self.shown = self._stream.isatty()

    def __call__(self, step: int, steps: int) -> None:
        """Step `step` of `steps` begins."""
        filled = self.width * step // steps
        self._stream.write(f"\rsampling [{'#' * filled}{'-' * (self.width - filled)}] step {step}/{steps}")
        self._stream.write("\n" if step == steps else "")
        self._stream.flush()


def settings_of(args: argparse.Namespace, config: ModelConfig) -> dict[str, Any]:
    """What made the images, defaults resolved: the PNGs carry it as metadata."""
    given = {"width": config.native_size, "height": config.native_size}
    given |= {name: getattr(config, name) for name in ("steps", "guidance_scale", "image_guidance_scale")}
    given |= {name: getattr(args, name) for name in given if getattr(args, name) is not None}
    return {"prompt": args.prompt, "image": str(args.image) if args.image else None, **given, "model": str(args.model)}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    check(args)
    from dreamlite_jax import load_model, pictures

    image = pictures.read_picture(args.image) if args.image else None
    model = load_model(args.model)
    started = time.monotonic()
    seeds = [args.seed + i for i in range(args.num_images)]
    settings = settings_of(args, model.config)
    options = {k: settings[k] for k in ("steps", "guidance_scale", "image_guidance_scale", "width", "height")}
    bar = StepBar()
    result = model.run(
        [args.prompt] * args.num_images,
        images=[image] * args.num_images if image else None,
        seeds=seeds,
        progress=bar if bar.shown else None,
        **options,
    )
    for folder in filter(None, (args.output.parent, args.preview)):
        folder.mkdir(parents=True, exist_ok=True)
    for path, pixels, seed in zip(outputs(args.output, args.num_images), result.images, seeds, strict=True):
        pictures.save_png(path, pixels, {"dreamlite_jax": json.dumps({**settings, "seed": seed})})
        print(path)
    if args.preview:
        for step, latents in enumerate(result.trajectory):
            row = np.concatenate(list(model.decode_latents(latents)), axis=1)
            about = {**settings, "seeds": seeds, "step": step + 1}
            pictures.save_png(args.preview / f"step_{step:02d}.png", row, {"dreamlite_jax": json.dumps(about)})
    print(f"{args.num_images} image(s) in {time.monotonic() - started:.1f}s, compilation included", file=sys.stderr)
    return 0


if __name__ == "__main__":
    cli.run(main)
