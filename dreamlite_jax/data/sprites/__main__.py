"""Writes the sprites data sets: python -m dreamlite_jax.data.sprites --data_dir DIR [--task t2i edit] [--size 64]."""

import sys
from collections.abc import Sequence
from pathlib import Path

from dreamlite_jax import cli
from dreamlite_jax.data.sprites import builder


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.documented("dreamlite_jax.data.sprites", __doc__)
    parser.add_argument("--data_dir", required=True, type=Path)
    parser.add_argument("--task", nargs="+", default=["t2i", "edit"], choices=["t2i", "edit"])
    parser.add_argument("--size", type=int, default=64, help="pixels: 64, 128 or 256")
    parser.add_argument("--seed", type=int, default=0)
    for split, count in builder.DEFAULT_COUNTS.items():
        parser.add_argument(f"--{split}", type=int, default=count, help="records of this split")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    cli.check_writable("--data_dir", args.data_dir.expanduser())
    counts = {split: getattr(args, split) for split in builder.DEFAULT_COUNTS}
    for task in args.task:
        print(builder.prepare(args.data_dir, task, args.size, counts, args.seed))
    return 0


if __name__ == "__main__":
    cli.run(main)
