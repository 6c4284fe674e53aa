"""Errors of a run, each with what the next person needs to know."""

import sys


class NonFiniteError(FloatingPointError):
    """A loss or norm that is not a number; the last good checkpoint stays as it is."""

    def __init__(self, step: int, bad: dict[str, float], batch: str | None = None):
        """`batch`: what of the step's batch is not finite; "" if it is, None if nobody has looked."""
        values = ", ".join(f"{name} {value}" for name, value in bad.items())
        if batch:
            cause = f"The batch of this step is not finite: {batch}. Mend the data; no setting of training helps"
        else:
            known = "" if batch is None else "The batch of this step is finite. "
            cause = f"{known}A lower learning rate or clip norm usually helps"
        super().__init__(
            f"step {step}: {values}; the last checkpoint before it is kept. {cause}; the data of this step are those "
            "of any rerun."
        )
        self.step, self.bad = step, bad


class CollapseError(ArithmeticError):
    """A figure of the training left its bounds; the last good checkpoint stays as it is."""

    def __init__(self, step: int, name: str, value: float, least: float, most: float):
        super().__init__(
            f"step {step}: {name} is {value:.4g}, outside {least:g} to {most:g}: the model has collapsed; the last "
            "checkpoint before it is kept. A lower learning rate or reward weight usually helps; the bounds are in the "
            "stage's part of the config."
        )
        self.step = step


class SaveError(OSError):
    """A checkpoint that could not be written; those before it are whole."""

    def __init__(self, step: int, before: int | None, cause: BaseException):
        kept = f"the checkpoint of step {before} is kept" if before else "no checkpoint was written before"
        super().__init__(f"the checkpoint of step {step} was not written ({short(cause)}); {kept}")
        self.step = step


def mute_abandoned_writes() -> None:
    """Keeps a `SaveError` readable: after a failed save each write still under way would print a traceback of its own.

    There are as many as arrays. TensorStore's threads raise them when they report to the event loop of a save that has
    ended; the first failure is the `SaveError`'s cause, and these say nothing more.
    """
    before = sys.unraisablehook

    def hook(raised: "sys.UnraisableHookArgs") -> None:
        if not (raised.exc_type is RuntimeError and str(raised.exc_value) == "Event loop is closed"):
            before(raised)

    sys.unraisablehook = hook


class Preempted(Exception):
    """The run stopped as it was asked to, with everything saved."""

    def __init__(self, step: int):
        super().__init__(f"stopped as asked, after step {step}, which is saved; the same command goes on from there")
        self.step = step


def short(error: BaseException) -> str:
    """The first line of an error's message, or its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
