#!/usr/bin/env python3
"""Input of training beside a PyTorch DataLoader with the same decode and crop, in one run: launch/bench_input.py.

    taskset -c 0,1 launch/bench_input.py --workers 2 --seconds 10 --rounds 3

Both read the same JPEG files (see `dreamlite_jax.bench`) with the same code for decoding and cutting, shuffled, into
float32 batches of 64 pictures of 256 px in [-1, 1]; they take turns, and the median of the rounds counts. Ours reads
with threads and with processes, theirs with worker processes. Needs torch (`pip install -c constraints.txt torch`).
"""

import dataclasses
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from dreamlite_jax import bench, cli
from dreamlite_jax.data import transforms

BATCH = 64


class Pictures:
    """The files as a map-style data set of tensors."""

    def __init__(self, folder: Path):
        self.paths = sorted(folder.glob("*.jpg"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int):
        import torch

        size = (bench.SIZE, bench.SIZE)
        picture = transforms.open_picture(self.paths[index].read_bytes(), size)
        pixels = transforms.cut(picture, transforms.crop_box(picture.size, size), size)
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float().div_(127.5).sub_(1.0)


def torch_batches(folder: Path, workers: int) -> Iterator[int]:
    """Pictures in each batch of a DataLoader, epoch after epoch."""
    from torch.utils.data import DataLoader

    loader = DataLoader(
        Pictures(folder), BATCH, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=True
    )
    while True:
        for batch in loader:
            yield len(batch)


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(prog="launch/bench_input.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=1024)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = bench.write_photographs(Path(scratch) / "pictures", args.pictures)
        size = statistics.mean(path.stat().st_size for path in folder.glob("*.jpg"))
        print(f"{args.pictures} JPEGs of {size / 1000:.0f} KB, {args.workers} workers", flush=True)
        data = bench.photographs_config(folder, BATCH)
        ways = {
            "ours, threads": lambda: bench.batches_of(dataclasses.replace(data, threads=args.workers)),
            "ours, processes": lambda: bench.batches_of(dataclasses.replace(data, processes=args.workers)),
            "torch DataLoader": lambda: torch_batches(folder, args.workers),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, start in ways.items():
                batches = start()
                rates[name].append(bench.images_per_sec(batches, args.seconds))
                batches.close()
        for name, found in rates.items():
            median = statistics.median(found)
            print(f"{name:17} {median:6.0f} images/s   ({', '.join(f'{rate:.0f}' for rate in found)})")
    return 0


if __name__ == "__main__":
    cli.run(main)
