"""Errors of a run, each with what the next person needs to know."""


class NonFiniteError(FloatingPointError):
    """A loss or gradient that is not a number; the last good checkpoint stays as it is."""

    def __init__(self, step: int, loss: float, grad_norm: float):
        super().__init__(
            f"step {step}: loss {loss}, gradient norm {grad_norm}; the last checkpoint before it is kept. "
            "A lower learning rate or clip norm usually helps; the data of this step are those of any rerun."
        )
        self.step = step
