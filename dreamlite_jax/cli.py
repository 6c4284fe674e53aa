"""What every command line shares: one way to report bad input."""

import argparse
import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from dreamlite_jax.assets import DEMO
from dreamlite_jax.config import suggestion
from dreamlite_jax.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are `UserError`s of one line, with a suggestion for an unknown argument.

    Flags are written in full: an abbreviation would change its meaning when a flag is added.
    """

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        args = list(sys.argv[1:] if args is None else args)
        known = [flag for flag in self._option_string_actions if flag.startswith("--")]
        for arg in args:  # before argparse looks, which would first ask for what is missing
            flag = arg.partition("=")[0]
            if flag.startswith("--") and flag != "--" and flag not in known:
                raise UserError(f"{flag} is not an argument{suggestion(flag, known)}")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def documented(module: str, text: str | None) -> Parser:
    """The parser of `python -m module`, whose docstring is `text`: --help begins with it as it stands."""
    description, _, details = (text or "").partition("\n\n")
    layout = argparse.RawDescriptionHelpFormatter
    return Parser(prog=f"python -m {module}", description=description, epilog=details, formatter_class=layout)


def add_model(parser: argparse.ArgumentParser) -> None:
    """--model, of the commands that draw."""
    parser.add_argument(
        "--model",
        type=Path,
        default=DEMO,
        help="model folder, workdir of a training run, or diffusers folder; default: the small model of sprites that "
        "travels with the package",
    )


def add_config(parser: argparse.ArgumentParser, **options) -> None:
    """--config, of the commands that read one (`config_files`)."""
    parser.add_argument(
        "--config",
        metavar="FILE.py[:ARG]",
        help="a Python file such as configs/quickstart.py:t2i, or by name one that travels with the package: "
        "quickstart:t2i",
        **options,
    )


def model_name(model: Path) -> str:
    """What pictures and reports call the --model they are of: what was given."""
    return "demo" if model == DEMO else str(model)


def check_writable(name: str, folder: Path) -> None:
    """Raises `UserError` unless `folder` is, or can become, a folder to write into; creates nothing.

    `name` is the argument to blame, such as "--output".
    """
    folder = Path(folder).absolute()
    nearest = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not nearest.is_dir():
        raise UserError(f"{name} {folder} cannot be made: {nearest} is a file; choose another folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{name} {folder} cannot be written: no permission in {nearest}; choose another folder")


def check_png(name: str, path: Path) -> None:
    """Raises `UserError` unless a picture can be written to `path`; creates nothing."""
    if path.suffix.lower() != ".png":
        raise UserError(f"{name} {path} must end in .png: the settings are stored in the file as PNG metadata")
    check_file(name, path)


def check_file(name: str, path: Path) -> None:
    """Raises `UserError` unless a file can be written to `path`, its folder made if need be; creates nothing."""
    try:
        if path.is_dir():
            raise UserError(f"{name} {path} is a folder; name a file in it")
        path.with_name(f".{path.name}.{os.getpid()}.part").lstat()  # files are written under such a name first
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{name} {path}: this name is longer than the file system takes; shorten it") from None
    check_writable(name, path.parent)


def run(main: Callable[[], int | None]) -> None:
    """Calls `main` and exits the process: 0 or its return value, 2 with one line on stderr after a `UserError`.

    Any other exception keeps its traceback: it is a defect of ours or of the machine, and hiding it helps nobody.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # paths are bytes, and are printed as they were given
        sys.stdout.reconfigure(errors="surrogateescape")
    try:
        code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code or 0)
