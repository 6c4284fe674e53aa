"""The state that every stage trains: what is saved of it, and under which names."""

from typing import Any

import flax.struct

NAMES = ("params", "ema", "opt_state", "step")  # that every checkpoint has


@flax.struct.dataclass
class TrainState:
    """Arrays, or their shapes or shardings.

    Attributes:
      params: what is trained.
      ema: its moving average, which grids show and the export holds.
      opt_state: of the optimiser of `params`.
      step: steps taken, () int32.
      extra: by name, what else a stage trains, such as a second network and its optimiser's state. Saved.
      frozen: by name, networks that never change. Not saved: a run that is resumed reads them where it began.
    """

    params: Any
    ema: Any
    opt_state: Any
    step: Any
    extra: dict[str, Any] = flax.struct.field(default_factory=dict)
    frozen: dict[str, Any] = flax.struct.field(default_factory=dict)


def saved(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds of a state, by the names that it has there."""
    return {name: getattr(state, name) for name in NAMES} | state.extra


def from_saved(parts: dict[str, Any]) -> TrainState:
    """The state of which `parts` were saved, without what is frozen."""
    extra = {name: part for name, part in parts.items() if name not in NAMES}
    return TrainState(*(parts[name] for name in NAMES), extra=extra)
