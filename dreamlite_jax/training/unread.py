"""Settings that nothing would read: where one differs from its default, somebody expects an effect of it."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from dreamlite_jax.errors import UserError

LATENT_STAGES = ("flow_matching", "refl", "dmd2")
# Sections and fields of `TrainConfig` that not every stage reads, and the stages that do. `model` is not among them: it
# describes what is exported.
STAGES = {
    "flow.logit_mean": ("flow_matching", "refl"),
    "flow.logit_std": ("flow_matching", "refl"),
    "flow.text_drop": ("flow_matching", "refl"),
    "flow.image_drop": ("flow_matching", "refl"),
    "flow.region_weight": LATENT_STAGES,
    "autoencoder": ("vae",),
    "refl": ("refl",),
    "dmd": ("dmd2",),
    "vae": LATENT_STAGES,
    "dtype": LATENT_STAGES,
    "remat": LATENT_STAGES,
    "remat_keep": LATENT_STAGES,
    "grid_steps": LATENT_STAGES,
    "data.text_length": LATENT_STAGES,
}
# Fields of `SourceConfig` that not every kind reads, and the kinds that do.
KINDS = {
    "name": ("sprites", "tfds", "array_record", "folder"),
    "split": ("sprites", "tfds"),
    "fields": ("tfds", "array_record", "folder"),
    "changed_levels": ("sprites", "tfds", "array_record", "folder"),
    "least_side": ("sprites", "tfds", "array_record", "folder"),
    "most_cut": ("sprites", "tfds", "array_record", "folder"),
}


def check_training(config: Any) -> None:
    """Raises `UserError` for the first setting of a `TrainConfig` that has no effect in it."""
    stages = {stage for readers in STAGES.values() for stage in readers}
    if config.stage in stages:  # of another, nobody here knows what it reads
        for path, readers in STAGES.items():
            if config.stage not in readers:
                _refuse(path, config, f"stage {config.stage} does not read it; {_those('stage', readers)}")
    if not config.remat:
        _refuse("remat_keep", config, "only remat=True reads it")
    _refuse("dmd.fake.ema_decay", config, "nothing reads it: the fake score has no average")
    data = config.data
    if config.stage == "vae":
        if not data.buckets.size and all(source.form == "sprites" for source in data.sources):
            for name in ("processes", "max_bad_fraction"):
                _refuse(
                    f"data.{name}",
                    config,
                    "sprites in their own size are read without it; data.buckets.size > 0 reads it",
                )
    elif data.encode == "precomputed":
        _refuse(
            "data.processes", config, "precomputed latents are read by data.threads; data.encode='on_device' reads it"
        )
    for name in ("sources", "validation"):
        for i, source in enumerate(getattr(data, name)):
            check_source(source, f"data.{name}[{i}].")
            if name == "validation":
                _refuse(
                    "weight",
                    source,
                    "pictures along the way have no mixture; data.sources reads it",
                    f"data.validation[{i}].",
                )


def check_precomputed(config: Any) -> None:
    """Raises `UserError` for the first setting of a `PrecomputeConfig` that has no effect in it."""
    check_source(config.source, "source.")
    _refuse("weight", config.source, "one source has no mixture; training's data.sources reads it", "source.")


def check_source(source: Any, where: str) -> None:
    """The same for a source, whose place in the config is `where`."""
    for name, readers in KINDS.items():
        if source.form not in readers:
            _refuse(name, source, f"a source of kind {source.form} does not read it; {_those('kind', readers)}", where)


def _those(what: str, readers: tuple[str, ...]) -> str:
    return f"{what} {', '.join(readers)} {'does' if len(readers) == 1 else 'do'}"


def _refuse(path: str, config: Any, why: str, where: str = "") -> None:
    *sections, last = path.split(".")
    for section in sections:
        config = getattr(config, section)
    field = next(field for field in dataclasses.fields(config) if field.name == last)
    for name, found in _changed(getattr(config, last), _default(field), path):
        raise UserError(f"{where}{name} is {found!r}, but {why}")


def _changed(value: Any, default: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Fields below `path` whose values differ from the default."""
    if not dataclasses.is_dataclass(value):
        if value != default:
            yield path, value
        return
    for field in dataclasses.fields(value):
        yield from _changed(getattr(value, field.name), getattr(default, field.name), f"{path}.{field.name}")


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default is dataclasses.MISSING else field.default
