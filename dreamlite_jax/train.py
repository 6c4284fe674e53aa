"""Trains one stage: python -m dreamlite_jax.train --config configs/quickstart.py:t2i --workdir DIR [--config.x=9] …

The same command again goes on from the last checkpoint. Exit codes: 0 done, 2 bad input, 75 (`exit_codes.PREEMPTED`)
stopped by SIGTERM or ahead of a machine's maintenance with everything saved: run it again. On several hosts every host
runs the same command with the same --workdir on storage that all of them share; TPU hosts find each other, others are
told by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID or by the flags of those names.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from dreamlite_jax import cli, exit_codes
from dreamlite_jax.errors import UserError
from dreamlite_jax.training.config import TrainConfig, load_config

OVERRIDE = "--config."
OWN = {  # what a run leaves in its workdir
    "checkpoints",
    "damaged",
    "bad_records",
    "metrics.jsonl",
    "metrics.tmp",
    "tensorboard",
    "grids",
    "profile",
    "model",
    "superseded",
    "run.lock",  # `training.claim`: while a run lives, or was killed
}
PARTIAL_EXPORT = ".model."  # what `model_folder.new_folder` calls "model" while it is being written
CLAIM = ("run.lock.", ".run.lock.")  # how it is called while it is written or taken over
PROBE = ".preflight."  # how the folder begins in which launch/preflight.py tries whether it can write


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, TrainConfig]:
    """Arguments and the validated config; nothing has touched a device yet."""
    parser = cli.documented("dreamlite_jax.train", __doc__)
    cli.add_config(parser, required=True)
    parser.add_argument(
        "--workdir", required=True, type=Path, help="checkpoints, metrics, grids and the exported model"
    )
    parser.add_argument("--check", action="store_true", help="validate config, data and shapes, then stop")
    parser.add_argument("--coordinator", default="", metavar="HOST:PORT", help="address of process 0")
    parser.add_argument("--num_processes", default="", metavar="N", help="processes of this run, one a host")
    parser.add_argument("--process_id", default="", metavar="I", help="which of them this is, from 0")
    overrides = [a[len(OVERRIDE) :] for a in argv if a.startswith(OVERRIDE)]
    args = parser.parse_args([a for a in argv if not a.startswith(OVERRIDE)])
    return args, load_config(args.config, overrides)


def check_workdir(workdir: Path) -> None:
    """Raises `UserError` unless the folder can be written and holds at most a run of this command. Creates nothing."""
    cli.check_writable("--workdir", workdir)
    names = {path.name for path in workdir.iterdir()} if workdir.exists() else set()
    foreign = {name for name in names - OWN if not name.startswith((PARTIAL_EXPORT, PROBE, *CLAIM))}
    if foreign:
        raise UserError(
            f"--workdir {workdir} holds {min(foreign)!r}, which no run of this command made; use an empty folder, "
            "or the folder of the run to go on with"
        )


def prepare_workdir(workdir: Path) -> None:
    """Creates the folder, and clears away what kills cut short: an export, or a preflight."""
    workdir.mkdir(parents=True, exist_ok=True)
    for beginning in (PARTIAL_EXPORT, PROBE):
        for partial in workdir.glob(f"{beginning}*"):
            shutil.rmtree(partial, ignore_errors=True)  # another process of this run may be at it too


def main(argv: Sequence[str] | None = None) -> int:
    args, config = parse(sys.argv[1:] if argv is None else argv)
    check_workdir(args.workdir)
    from dreamlite_jax.parallel import distributed

    distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    from dreamlite_jax.training.build import build

    stage, feed, gallery = build(config)
    if args.check:
        import jax

        from dreamlite_jax.training.loop import check

        for line in check(config, stage, feed, args.workdir):
            print(line)
        jax.clear_caches()
        return 0
    from dreamlite_jax.training.claim import Claim
    from dreamlite_jax.training.errors import Preempted, mute_abandoned_writes
    from dreamlite_jax.training.loop import train

    mute_abandoned_writes()
    code = 0
    with Claim(args.workdir) as claim:
        prepare_workdir(args.workdir)
        try:
            train(config, stage, feed, gallery, args.workdir, claim.check)
        except Preempted as stopped:
            print(stopped, file=sys.stderr)
            code = exit_codes.PREEMPTED
    distributed.leave()
    return code


if __name__ == "__main__":
    cli.run(main)
