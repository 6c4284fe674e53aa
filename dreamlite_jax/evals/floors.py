"""What pictures score that no model made: a number of the benchmark means something above its floors alone.

The floors are judged as a model's pictures are, on the same items: nothing here is a constant. No JAX here.
"""

from typing import Any

import numpy as np

LIGHT_GREY = 200
FLOORS = ("light grey", "mean colour", "noise", "blank", "untouched")


def plain_pictures(count: int, size: int, seed: int, sources: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """(count, size, size, 3) uint8 of each floor: one light grey, uniform noise, white; with the sources of edits also
    the mean colour of each source, and the sources untouched."""
    shape = (count, size, size, 3)
    made = {
        "light grey": np.full(shape, LIGHT_GREY, np.uint8),
        "noise": np.random.default_rng(seed).integers(0, 256, shape, np.uint8),
        "blank": np.full(shape, 255, np.uint8),
    }
    if sources is not None:
        mean = np.round(sources.mean((1, 2), keepdims=True)).astype(np.uint8)
        made |= {"mean colour": np.broadcast_to(mean, shape), "untouched": sources}
    return {name: made[name] for name in FLOORS if name in made}


def numbers(scores: dict[str, Any]) -> dict[str, float]:
    """The scores that are one number, without chance."""
    return {name: value for name, value in scores.items() if isinstance(value, float) and name != "chance"}


def beside(scores: dict[str, Any], name: str, form: str = ".2f") -> str:
    """The floors of a score in words: "light grey 0.72, …, untouched 0.00"."""
    if "floors" not in scores:  # a report of an older version
        return "floors unmeasured"
    return ", ".join(f"{floor} {found[name]:{form}}" for floor, found in scores["floors"].items())


def lines(scores: dict[str, Any]) -> list[str]:
    """One line for every floor, with its scores."""
    return [
        f"{floor}: " + "  ".join(f"{name} {value:.3f}" for name, value in found.items())
        for floor, found in scores.get("floors", {}).items()
    ]
