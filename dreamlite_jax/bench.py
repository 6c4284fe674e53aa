"""Measures a part of training alone: python -m dreamlite_jax.bench --what data [--config FILE.py[:ARG]] [--threads N].

`data` reads batches as training would and drops them: files to float pictures, cut to their buckets. Without a config
these are 256 px JPEGs like photographs (quality 92, short side 256, 3:2 and 2:3), made for the purpose and cut to
squares of 256 px. `launch/bench_input.py` runs it beside a PyTorch DataLoader.
"""

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dreamlite_jax import cli
from dreamlite_jax.data.config import BucketConfig, DataConfig, SourceConfig
from dreamlite_jax.data.forms import Images
from dreamlite_jax.data.mixture import raw_batches
from dreamlite_jax.errors import UserError
from dreamlite_jax.training.config import load_config

SIZE, QUALITY = 256, 92


def photograph(rng: np.random.Generator) -> Image.Image:
    """Colour noise of every scale, falling off as in photographs; 384x256 or 256x384."""
    long, short = SIZE * 3 // 2, SIZE
    width, height = (long, short) if rng.random() < 0.5 else (short, long)
    picture = np.zeros((height, width, 3), np.float32)
    for cells in (2, 4, 8, 16, 32, 64, 128):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        picture += (np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), np.float32) - 128) / cells**0.5
    return Image.fromarray(np.clip(picture + 128, 0, 255).astype(np.uint8))


def write_photographs(folder: Path, count: int, seed: int = 0) -> Path:
    """A source of kind folder with `count` pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        photograph(rng).save(folder / f"{i:05d}.jpg", quality=QUALITY)
        rows.append({"image": f"{i:05d}.jpg", "caption": f"picture {i}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def photographs_config(folder: Path, batch_size: int) -> DataConfig:
    return DataConfig(
        (SourceConfig(str(folder), kind="folder"),), batch_size, buckets=BucketConfig(SIZE), encode="on_device"
    )


def batches_of(data: DataConfig) -> Iterator[int]:
    """Pictures in each batch, once it is there."""
    iterator = iter(raw_batches(data, Images, seed=0))
    try:
        for batch in iterator:
            yield len(batch["image"])
    finally:
        iterator.close()


def images_per_sec(batches: Iterator[int], seconds: float, warmup: int = 3) -> float:
    """Rate over some seconds of steady reading; the first batches, in which workers start, do not count."""
    for _ in range(warmup):
        next(batches)
    started, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - started) < seconds:
        count += next(batches)
    return count / passed


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = cli.documented("dreamlite_jax.bench", __doc__)
    parser.add_argument("--what", required=True, choices=["data"], help="the part to measure")
    cli.add_config(parser)  # one that reads raw pictures
    parser.add_argument("--threads", type=int, help="in place of the config's")
    parser.add_argument("--processes", type=int, help="in place of the config's")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--pictures", type=int, default=1024, help="to make where there is no config")
    args = parser.parse_args([a for a in argv if not a.startswith("--config.")])
    overrides = [a.removeprefix("--config.") for a in argv if a.startswith("--config.")]
    with tempfile.TemporaryDirectory() as scratch:
        if args.config:
            data = load_config(args.config, overrides).data
            if any(source.form == "latents" for source in data.sources):
                raise UserError("--config reads precomputed latents; --what data measures raw pictures")
        else:
            data = photographs_config(write_photographs(Path(scratch) / "pictures", args.pictures), 64)
        workers = {name: value for name in ("threads", "processes") if (value := getattr(args, name)) is not None}
        data = dataclasses.replace(data, **workers)
        rate = images_per_sec(batches_of(data), args.seconds)
        work = f"{data.processes} processes" if data.processes else f"{data.threads} threads"
        print(f"data: {rate:.0f} images/s ({work}, batches of {data.batch_size}, {args.seconds:g} s)")
    return 0


if __name__ == "__main__":
    cli.run(main)
