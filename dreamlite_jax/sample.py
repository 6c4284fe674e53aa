"""Generates or edits: python -m dreamlite_jax.sample [--model DIR] --prompt TEXT [--image PNG] --output PNG.

  generate   --prompt "a red fox on a frozen lake" --output fox.png --num_images 4
  edit       --prompt "make it snowy" --image house.jpg --output snowy.png

DIR is a model folder, the workdir of a training run, or a released DreamLite folder as it is (base or mobile): the
folder says how many steps and how much guidance it wants. An image depends on its prompt and its own seed alone, not on
what else is in the batch or on how many devices there are. Every PNG carries all its settings as metadata, under
dreamlite_jax; --preview shows what the model predicted at each step.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from PIL import Image

from dreamlite_jax import cli, settings
from dreamlite_jax.config import ModelConfig, image_size
from dreamlite_jax.errors import UserError


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = cli.documented("dreamlite_jax.sample", __doc__)
    cli.add_model(parser)
    parser.add_argument("--prompt", required=True, help="what to draw, or with --image what to change")
    parser.add_argument("--image", type=Path, help="source of an edit; PNG, JPEG or WebP")
    parser.add_argument("--output", required=True, type=Path, help="PNG; with several images a number is added")
    parser.add_argument("--steps", type=int, help="default: the model's own, as for the scales")
    parser.add_argument("--guidance_scale", type=float, help="of the prompt; 1 (and 1 below, for an edit): no guidance")
    parser.add_argument("--image_guidance_scale", type=float, help="of an edit's source")
    parser.add_argument(
        "--width",
        type=int,
        help="pixels, as --height; default: the model's native size, or for an edit by a released model the source's "
        "size, rounded down to what the network takes",
    )
    parser.add_argument("--height", type=int)
    parser.add_argument("--seed", type=int, default=0, help="of the first image; the next ones count up")
    parser.add_argument("--num_images", type=int, default=1)
    parser.add_argument("--batch_size", type=int, help="images drawn at a time; default: about a megapixel a device")
    parser.add_argument(
        "--preview", type=Path, help="folder for what is predicted at each step, images of the first batch side by side"
    )
    return parser.parse_args(argv)


class Job(NamedTuple):
    """A command line that has been checked; `unread` is a line about words that the text encoder cannot read, or ""."""

    config: ModelConfig
    image: Image.Image | None
    width: int
    height: int
    unread: str


def check(args: argparse.Namespace) -> Job:
    """Everything that can be wrong before the model is loaded."""
    from dreamlite_jax import pictures
    from dreamlite_jax.model import load_config
    from dreamlite_jax.text.load import unread
    from dreamlite_jax.text.templates import clean_prompt

    prompt = clean_prompt("edit" if args.image else "generate", args.prompt)
    config = load_config(args.model)
    said = unread(config.text, prompt)
    image = pictures.read_picture(args.image) if args.image else None
    width, height = image_size(config, args.width, args.height, image.size if image else None)
    for name, least in (("steps", 1), ("num_images", 1), ("seed", 0), ("batch_size", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name} is {value}; it must be at least {least}")
    if args.seed + args.num_images > 2**32:
        raise UserError(
            f"--seed is {args.seed} and --num_images {args.num_images}; the last seed must be at most {2**32 - 1}"
        )
    paths = outputs(args.output, args.num_images)
    for path in paths:
        cli.check_png("--output", path)
    settings.check_source_stays(args.image, paths)
    if args.preview and args.preview.exists() and (not args.preview.is_dir() or any(args.preview.iterdir())):
        raise UserError(f"--preview {args.preview} is not an empty folder; choose another")
    if args.preview:
        cli.check_writable("--preview", args.preview)
    return Job(config, image, width, height, said)


def outputs(output: Path, count: int) -> list[Path]:
    """One path an image: the given one, or numbered ones."""
    digits = max(2, len(str(count - 1)))
    return [output] if count == 1 else [output.with_stem(f"{output.stem}_{i:0{digits}d}") for i in range(count)]


class StepBar:
    """A bar of sampling steps on a terminal; silent where stderr is a file, so that logs stay readable."""

    width = 30

    def __init__(self, stream: TextIO | None = None):
        self._stream = sys.stderr if stream is None else stream
        self.shown = self._stream.isatty()
        self._began = 0.0

    def __call__(self, step: int, steps: int) -> None:
        """Step `step` of `steps`, those of all batches, begins."""
        now = time.monotonic()
        if step == 1:
            self._began = now  # compilation lies before
        left = f", {duration((now - self._began) / (step - 1) * (steps - step + 1))} left" if step > 1 else ""
        filled = self.width * step // steps
        self._stream.write(f"\rsampling [{'#' * filled}{'-' * (self.width - filled)}] step {step}/{steps}{left}\x1b[K")
        self._stream.write("\n" if step == steps else "")
        self._stream.flush()


class Tally:
    """Lines on how many images are done, for logs: at most one in ten seconds, and none where a batch is all."""

    interval_s = 10.0

    def __init__(self, count: int):
        self._count, self._began = count, time.monotonic()
        self._said = self._began

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if done < self._count and now - self._said >= self.interval_s:
            self._said = now
            left = duration((now - self._began) / done * (self._count - done))
            print(f"{done} of {self._count} images, about {left} left", file=sys.stderr)


def duration(seconds: float) -> str:
    """In two units, such as 1 h 05 min."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


def settings_of(args: argparse.Namespace, job: Job) -> dict[str, Any]:
    """What made the images, defaults resolved: the PNGs carry it as metadata."""
    size, model = (job.width, job.height), cli.model_name(args.model)
    return settings.of_picture(job.config, args.prompt, args.image, vars(args), size, model)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    job = check(args)
    if job.unread:
        print(job.unread, file=sys.stderr)
    from dreamlite_jax import load_model, pictures
    from dreamlite_jax.text.words import UnreadWords

    model = load_model(args.model)
    started = time.monotonic()
    seeds = [args.seed + i for i in range(args.num_images)]
    about = settings_of(args, job)
    options = {k: about[k] for k in ("steps", "guidance_scale", "image_guidance_scale", "width", "height")}
    bar, tally, paths = StepBar(), Tally(args.num_images), outputs(args.output, args.num_images)
    warnings.simplefilter("ignore", UnreadWords)  # said above
    batches = model.batches(
        args.prompt,
        images=job.image,
        seeds=seeds,
        batch_size=args.batch_size,
        progress=bar if bar.shown else None,
        **options,
    )
    done = 0
    for made in batches:
        for folder in filter(None, (args.output.parent, args.preview)):
            folder.mkdir(parents=True, exist_ok=True)
        some = slice(done, done + len(made.images))
        for path, pixels, seed in zip(paths[some], made.images, seeds[some], strict=True):
            pictures.save_png(path, pixels, settings.as_text({**about, "seed": seed}))
            print(path, flush=True)
        if args.preview and not done:
            for step, latents in enumerate(made.trajectory):
                row = np.concatenate(list(model.decode_latents(latents)), axis=1)
                text = settings.as_text({**about, "seeds": seeds[some], "step": step + 1})
                pictures.save_png(args.preview / f"step_{step:02d}.png", row, text)
        done += len(made.images)
        if not bar.shown:
            tally(done)
    print(f"{args.num_images} image(s) in {time.monotonic() - started:.1f}s, compilation included", file=sys.stderr)
    return 0


if __name__ == "__main__":
    cli.run(main)
