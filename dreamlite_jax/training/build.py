"""The stage that a config names, with its feed and its gallery."""

import importlib

from dreamlite_jax.training.config import TrainConfig
from dreamlite_jax.training.stage import Run, Stage, check
from dreamlite_jax.training.stages import table


def stage_class(name: str) -> type[Stage]:
    """The class of what `config.stage` names. Only its own module is loaded: rewards need not be for the others."""
    kind = table.find(name).kind
    if isinstance(kind, type):
        return kind
    module, _, cls = kind.partition(":")
    return getattr(importlib.import_module(f"dreamlite_jax.training.stages.{module}"), cls)


def build(config: TrainConfig, *, shapes_only: bool = False) -> Run:
    """All that the loop runs; reads what must be known of the data before any is trained on.

    Args:
      shapes_only: for compiles and checks where data, autoencoder, judges and models to start from need not be here:
        the feed has shapes (`feed.ShapesOnly`), and there are no batches, grids or export.

    Raises:
      UserError: files are missing or do not fit the config, or the stage lacks a member.
    """
    run = stage_class(config.stage).assemble(config, shapes_only=shapes_only)
    check(run.stage)
    return run
