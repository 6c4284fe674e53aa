"""What config files share: reading their argument, and starting from the config of a file beside them."""

from collections.abc import Iterable
from pathlib import Path

from ml_collections import ConfigDict

from dreamlite_jax.training.config import read_config_file


def stage_and_root(argument: str, stages: Iterable[str], root: str) -> tuple[str, str]:
    """The two parts of a config's argument STAGE or STAGE,ROOT.

    Args:
      stages: the stages that the file knows.
      root: folder of data and runs where the argument names none.

    Raises:
      KeyError: an unknown stage; commands answer it in one line.
    """
    stage, _, given = argument.partition(",")
    if stage not in stages:
        raise KeyError(f"stage {stage!r} is not one of {', '.join(stages)}")
    return stage, given or root


def config_beside(file: str, location: str) -> ConfigDict:
    """The config `NAME.py:ARGUMENT` of the folder that `file` is in, to be changed."""
    return ConfigDict(read_config_file(f"{Path(file).parent}/{location}"))
