"""What training and `precompute` read: sources, their fields, buckets and mixtures."""

import dataclasses
from typing import Literal

from dreamlite_jax.config import check_bounds
from dreamlite_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class FieldsConfig:
    """What the fields of a source's records are called; parts of a nested one are joined by dots.

    A record with an `image` and a `caption` is one to generate; one with `source`, `instruction` and `target` is an
    edit. A `mask` (white where the edit changes the picture) and an `id` are used where there are any. Of a list, such
    as five captions of a picture, the first entry counts.
    """

    image: str = "image"
    caption: str = "caption"
    source: str = "source"
    instruction: str = "instruction"
    target: str = "target"
    mask: str = "mask"
    id: str = "id"


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of a mixture.

    What `path`, `name` and `split` mean depends on `kind`:
      latents: `path` is a folder that `precompute` wrote.
      sprites: data set `name` (t2i_64, edit_64, …), split `split`, in `path`.
      tfds: split `split` of tensorflow-datasets' `name` (such as coco_captions:1.1.0), as ArrayRecord in `path`.
      array_record: the shards *.array_record in folder `path` whose names begin with `name`, of msgpack maps.
      folder: pictures in folder `path`, and its file `name` (default: metadata.jsonl) with one JSON object a line.
    An empty kind means sprites where there is a `name`, else latents.

    Raw pictures with a side below `least_side` pixels, or that lose more than the share `most_cut` of their area when
    they are cut to their bucket, are bad records.
    """

    path: str
    weight: float = 1.0
    name: str = ""
    split: str = "train"
    kind: Literal["", "latents", "sprites", "tfds", "array_record", "folder"] = ""
    fields: FieldsConfig = FieldsConfig()
    changed_levels: int = 8  # of 255: an edit without a mask changes the pixels that differ by more than this
    least_side: int = 0
    most_cut: float = 1.0

    def __post_init__(self):
        check_bounds(self, ("weight",), above=0)
        check_bounds(self, ("changed_levels", "least_side"), least=0)
        check_bounds(self, ("most_cut",), least=0, most=1)

    @property
    def form(self) -> str:
        """The kind, spelt out."""
        return self.kind or ("sprites" if self.name else "latents")


@dataclasses.dataclass(frozen=True)
class BucketConfig:
    """Sizes that raw pictures are resized and cropped to: about `size`² pixels in area, at most `max_ratio` : 1.

    Sides are multiples of `multiple`. A `max_ratio` of 1 leaves the square alone; a `size` of 0 is the sprites' own.
    """

    size: int = 0
    multiple: int = 32
    max_ratio: float = 1.0

    def __post_init__(self):
        check_bounds(self, ("multiple", "max_ratio"), least=1)
        if self.size < 0 or self.size % self.multiple:
            near = max(1, round(self.size / self.multiple)) * self.multiple
            raise UserError(
                f"size is {self.size}; it must be a multiple of the buckets' multiple {self.multiple}, such as {near}"
            )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a stage reads. `batch_size` is the global batch over all hosts.

    `encode` says who turns pictures and words into latents and states: "precomputed" reads folders of `precompute`,
    "on_device" reads raw sources and encodes each batch with the frozen autoencoder and text encoder.
    Raw pictures are decoded by `threads`, or, when it is above 0, by `processes` of their own.
    Records that cannot be used are replaced and logged; above a `max_bad_fraction` of those read the run stops.
    A run that is to go on with other sources, weights or seed than before is refused; with `on_change` "restart" it
    goes on with them from their beginning.
    """

    sources: tuple[SourceConfig, ...]
    batch_size: int
    validation: tuple[SourceConfig, ...] = ()
    text_length: int = 64
    threads: int = 2
    processes: int = 0
    encode: Literal["precomputed", "on_device"] = "precomputed"
    buckets: BucketConfig = BucketConfig()
    max_bad_fraction: float = 0.01
    on_change: Literal["refuse", "restart"] = "refuse"

    def __post_init__(self):
        check_bounds(self, ("batch_size", "text_length"), least=1)
        check_bounds(self, ("threads", "processes"), least=0)
        check_bounds(self, ("max_bad_fraction",), least=0, most=1)
        if not self.sources:
            raise UserError("sources is empty; it needs at least one source to train on")
