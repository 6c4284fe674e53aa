"""Trains one stage: python -m dreamlite_jax.train --config configs/quickstart.py:t2i --workdir DIR [--config.x=9] …"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from dreamlite_jax import cli
from dreamlite_jax.errors import UserError
from dreamlite_jax.training.config import TrainConfig, load_config

OVERRIDE = "--config."
OWN = {
    "checkpoints",
    "metrics.jsonl",
    "metrics.tmp",
    "tensorboard",
    "grids",
    "model",
}  # what a run leaves in its workdir
PARTIAL_EXPORT = ".model."  # what `model_folder.new_folder` calls "model" while it is being written


def build_stage(config: TrainConfig):
    """The stage that a config asks for."""
    if config.stage == "vae":
        from dreamlite_jax.training.stages.vae import VAEStage

        return VAEStage(config)
    from dreamlite_jax.training.stages.flow_matching import FlowMatchingStage

    return FlowMatchingStage(config)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, TrainConfig]:
    """Arguments and the validated config; nothing has touched a device yet."""
    parser = cli.Parser(prog="python -m dreamlite_jax.train", description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE.py[:ARG]")
    parser.add_argument(
        "--workdir", required=True, type=Path, help="checkpoints, metrics, grids and the exported model"
    )
    parser.add_argument("--check", action="store_true", help="validate config, data and shapes, then stop")
    overrides = [a[len(OVERRIDE) :] for a in argv if a.startswith(OVERRIDE)]
    args = parser.parse_args([a for a in argv if not a.startswith(OVERRIDE)])
    return args, load_config(args.config, overrides)


def check_workdir(workdir: Path) -> None:
    """Raises `UserError` unless the folder can be written and holds at most a run of this command. Creates nothing."""
    cli.check_writable("--workdir", workdir)
    names = {path.name for path in workdir.iterdir()} if workdir.exists() else set()
    foreign = {name for name in names - OWN if not name.startswith(PARTIAL_EXPORT)}
    if foreign:
        raise UserError(
            f"--workdir {workdir} holds {min(foreign)!r}, which no run of this command made; use an empty folder, "
            "or the folder of the run to go on with"
        )


def prepare_workdir(workdir: Path) -> None:
    """Creates the folder, and clears away the export that a kill cut short."""
    workdir.mkdir(parents=True, exist_ok=True)
    for partial in workdir.glob(f"{PARTIAL_EXPORT}*"):
        shutil.rmtree(partial)


def main(argv: Sequence[str] | None = None) -> int:
    args, config = parse(sys.argv[1:] if argv is None else argv)
    check_workdir(args.workdir)
    stage = build_stage(config)
    if args.check:
        import jax

        from dreamlite_jax.training.loop import check

        for line in check(config, stage):
            print(line)
        jax.clear_caches()
        return 0
    from dreamlite_jax.training.loop import train

    prepare_workdir(args.workdir)
    train(config, stage, args.workdir)
    return 0


if __name__ == "__main__":
    cli.run(main)
