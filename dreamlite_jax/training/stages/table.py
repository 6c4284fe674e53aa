"""The stages that there are: the only list of them. What a config may name, and where its code is."""

import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from dreamlite_jax.config import suggestion
from dreamlite_jax.errors import UserError


class Row(NamedTuple):
    """A stage as configs are checked against it, before its code is loaded.

    Attributes:
      kind: its class, or for one of ours "module:class" in this package.
      accumulates, encodes: see `training.stage.Stage`.
    """

    kind: str | type
    accumulates: bool = False
    encodes: bool = False


STAGES: Mapping[str, Row] = MappingProxyType(
    {
        "flow_matching": Row("flow_matching:FlowMatchingStage", accumulates=True, encodes=True),
        "vae": Row("vae:VAEStage", encodes=True),
        "refl": Row("refl:ReFLStage"),
        "dmd2": Row("dmd2:DMD2Stage"),
    }
)


def find(stage: str) -> Row:
    """The row of what `config.stage` names: one of `STAGES`, or FILE.py:CLASS, which is loaded.

    Raises:
      UserError: there is no such stage.
    """
    if stage in STAGES:
        return STAGES[stage]
    path, separator, name = stage.rpartition(":")
    if not separator or not path.endswith(".py"):
        raise UserError(
            f"stage is {stage!r}; it must be one of {', '.join(map(repr, STAGES))}, or a stage of your own as "
            "FILE.py:CLASS"
        )
    module = _module(Path(path).absolute())
    base = sys.modules.get("dreamlite_jax.training.stage")  # which the file has imported, if it has a stage
    classes = {
        key: value for key, value in vars(module).items()
        if base and isinstance(value, type) and issubclass(value, base.Stage) and value.__module__ == module.__name__
    }  # fmt: skip
    if name not in classes:
        found = suggestion(name, classes) if classes else "; it has none"
        raise UserError(f"stage is {stage!r}, but {path} has no stage {name!r}{found}")
    kind = classes[name]
    return Row(kind, accumulates=kind.accumulates, encodes=kind.encodes)


@functools.cache
def _module(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"stage names {path}, but there is no such file")
    name = f"stage_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses look for their types
    spec.loader.exec_module(module)
    return module


def config_class(stage: Any, base: type) -> type:
    """`base` with the section of a stage of one's own, if this is one: its `Config`, named as its class in lower case.

    Raises:
      UserError: there is no such stage, or its `Config` cannot be a section.
    """
    if not isinstance(stage, str) or stage in STAGES:
        return base
    kind = find(stage).kind
    section, config = kind.__name__.lower(), kind.Config
    if config is None:
        return base
    if not dataclasses.is_dataclass(config) or not config.__dataclass_params__.frozen:
        raise UserError(f"stage {stage}: Config must be a frozen dataclass, such as those of training/config.py")
    if section in {field.name for field in dataclasses.fields(base)}:
        raise UserError(f"stage {stage}: config.{section} has a meaning already; name the class otherwise")
    missing = dataclasses.MISSING
    required = any(f.default is missing and f.default_factory is missing for f in dataclasses.fields(config))
    field = dataclasses.field(kw_only=True) if required else dataclasses.field(default_factory=config, kw_only=True)
    return dataclasses.make_dataclass(base.__name__, [(section, config, field)], bases=(base,), frozen=True)
