"""What every command line shares: one way to report bad input."""

import sys
from collections.abc import Callable

from dreamlite_jax.errors import UserError


def run(main: Callable[[], int | None]) -> None:
    """Calls `main` and exits the process: 0 or its return value, 2 with one line on stderr after a `UserError`.

    Any other exception keeps its traceback: it is a defect of ours or of the machine, and hiding it helps nobody.
    """
    try:
        code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code or 0)
