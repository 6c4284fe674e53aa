"""Where a --config is: a Python file on disk, or by name one of those that travel with the package."""

from pathlib import Path

from dreamlite_jax.errors import UserError

_PACKAGE = Path(__file__).parent


def folder() -> Path:
    """The configs of this package: inside it where it is installed, beside it in a checkout."""
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def names() -> list[str]:
    return sorted(file.stem for file in folder().glob("*.py"))


def split(location: str) -> tuple[str, str]:
    """File or name, and argument ("" without one). A path may hold colons: its argument is what follows `.py:`."""
    file, separator, argument = f"{location}:".partition(".py:")
    if separator:
        return f"{file}.py", argument.removesuffix(":")
    name, _, argument = location.partition(":")
    return name, argument


def find(path: str) -> Path:
    """The file at `path`, or the packaged config of that name where there is none.

    Raises:
      UserError: neither is there; or the file is not a Python file.
    """
    file = Path(path)
    if not file.is_file():
        if path in names():
            return folder() / f"{path}.py"
        name = file.stem
        if name in names():
            raise UserError(f"--config {path}: no such file; the one that travels with the package is --config {name}")
        raise UserError(
            f"--config {path}: no such file, and none of the configs that travel with the package: {', '.join(names())}"
        )
    if file.suffix != ".py":
        raise UserError(f"--config {path}: not a Python file; configs are such files as configs/quickstart.py")
    return file
