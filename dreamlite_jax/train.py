"""Trains one stage: python -m dreamlite_jax.train --config configs/quickstart.py:t2i --workdir DIR [--config.steps=100] [--check]."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dreamlite_jax import cli
from dreamlite_jax.errors import UserError
from dreamlite_jax.training.config import TrainConfig, load_config

OVERRIDE = "--config."


def build_stage(config: TrainConfig):
    """The stage that a config asks for."""
    if config.stage == "vae":
        from dreamlite_jax.training.stages.vae import VAEStage

        return VAEStage(config)
    from dreamlite_jax.training.stages.flow_matching import FlowMatchingStage

    return FlowMatchingStage(config)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, TrainConfig]:
    """Arguments and the validated config; nothing has touched a device yet."""
    parser = argparse.ArgumentParser(prog="python -m dreamlite_jax.train", description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE.py[:ARG]")
    parser.add_argument("--workdir", required=True, type=Path, help="checkpoints, metrics, grids and the exported model")
    parser.add_argument("--check", action="store_true", help="validate config, data and shapes, then stop")
    overrides = [a[len(OVERRIDE) :] for a in argv if a.startswith(OVERRIDE)]
    args = parser.parse_args([a for a in argv if not a.startswith(OVERRIDE)])
    return args, load_config(args.config, overrides)


def prepare_workdir(workdir: Path) -> None:
    """Creates the folder and proves that it can be written."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".write_probe_{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be written ({error.strerror}); choose a folder that can") from error
    foreign = {p.name for p in workdir.iterdir()} - {"checkpoints", "metrics.jsonl", "metrics.tmp", "tensorboard", "grids", "model"}
    if foreign:
        raise UserError(
            f"--workdir {workdir} holds {sorted(foreign)[0]!r}, which no run of this command made; use an empty folder, "
            "or the folder of the run to go on with"
        )


def main(argv: Sequence[str] | None = None) -> int:
    args, config = parse(sys.argv[1:] if argv is None else argv)
    prepare_workdir(args.workdir)
    stage = build_stage(config)
    if args.check:
        import jax

        from dreamlite_jax.training.loop import check

        for line in check(config, stage):
            print(line)
        jax.clear_caches()
        return 0
    from dreamlite_jax.training.loop import train

    train(config, stage, args.workdir)
    return 0


if __name__ == "__main__":
    cli.run(main)
