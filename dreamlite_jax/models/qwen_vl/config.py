"""Architecture of the Qwen vision-language towers, read from the `config.json` of a transformers folder."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dreamlite_jax.config import from_dict
from dreamlite_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class TextTowerConfig:
    """Causal decoder with grouped-query attention and multimodal rotary positions (M-RoPE).

    `qk_norm`, `qkv_bias` and `mrope_interleaved` are what tells Qwen3-VL (True, False, True) from Qwen2-VL and
    Qwen2.5-VL (False, True, False). `mrope_section` counts the rotary frequencies that follow time, row and column.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    mrope_section: tuple[int, int, int]
    mrope_interleaved: bool = True
    qk_norm: bool = True
    qkv_bias: bool = False
    norm_eps: float = 1e-6

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"text_config.num_attention_heads {self.num_heads} is not a multiple of num_key_value_heads "
                f"{self.num_kv_heads}"
            )
        if 2 * sum(self.mrope_section) != self.head_dim:
            raise UserError(
                f"text_config mrope_section {list(self.mrope_section)} adds up to {sum(self.mrope_section)}; "
                f"half of head_dim {self.head_dim} is {self.head_dim // 2}"
            )


@dataclasses.dataclass(frozen=True)
class VisionTowerConfig:
    """Vision transformer of Qwen3-VL: learned positions resampled to the grid, axial RoPE, deepstack taps.

    `deepstack_indexes` are the blocks whose output also enters the first text layers, one block a layer.
    `num_position_embeddings` is the area of the square table of learned positions.
    """

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    deepstack_indexes: tuple[int, ...]
    patch_size: int = 16
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    in_channels: int = 3
    num_position_embeddings: int = 2304
    rope_theta: float = 10000.0

    def __post_init__(self):
        if self.hidden_size % (4 * self.num_heads):
            raise UserError(
                f"vision_config.hidden_size {self.hidden_size} is not a multiple of 4 x num_heads {self.num_heads}; "
                "each head is rotated in quarters (sine and cosine of row and column)"
            )
        if self.position_side**2 != self.num_position_embeddings:
            raise UserError(
                f"vision_config.num_position_embeddings {self.num_position_embeddings} is not a square number"
            )
        taps = self.deepstack_indexes
        if list(taps) != sorted(set(taps)) or any(not 0 <= tap < self.depth for tap in taps):
            raise UserError(
                f"vision_config.deepstack_visual_indexes is {list(taps)}; it must be increasing block numbers below "
                f"depth {self.depth}"
            )

    @property
    def patch_dim(self) -> int:
        """Values of one flattened patch: channels x frames x rows x columns."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches that become one text token."""
        return self.spatial_merge_size**2

    @property
    def position_side(self) -> int:
        return int(self.num_position_embeddings**0.5)


@dataclasses.dataclass(frozen=True)
class QwenVLConfig:
    """Both towers, and the token ids that mark an image in the text."""

    text: TextTowerConfig
    vision: VisionTowerConfig
    image_token_id: int = 151655
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653

    def __post_init__(self):
        if self.vision.out_hidden_size != self.text.hidden_size:
            raise UserError(
                f"vision_config.out_hidden_size is {self.vision.out_hidden_size} but text_config.hidden_size is "
                f"{self.text.hidden_size}; image tokens enter the text tower, so they must be equal"
            )
        if len(self.vision.deepstack_indexes) > self.text.num_layers:
            raise UserError(
                f"vision_config.deepstack_visual_indexes has {len(self.vision.deepstack_indexes)} entries; "
                f"the text tower has only {self.text.num_layers} layers to receive them"
            )


def from_transformers(mapping: Mapping[str, Any], where: str = "config.json") -> QwenVLConfig:
    """Config of a Qwen3-VL checkpoint from its parsed `config.json`, written by transformers 4.57 or 5.

    Keys that do not change the hidden states (token ids of generation, dropout, initialiser) are ignored.

    Raises:
      UserError: another model type, a missing size, or a variant that the towers do not compute (the message names the
        key, its value and what is supported).
    """
    if mapping.get("model_type") != "qwen3_vl":
        raise UserError(f"{where}: model_type is {mapping.get('model_type')!r}; it must be 'qwen3_vl'")
    text, vision = _section(mapping, "text_config", where), _section(mapping, "vision_config", where)
    _require(text, "hidden_act", "silu", f"{where}: text_config")
    _require(text, "attention_bias", False, f"{where}: text_config")
    _require(vision, "hidden_act", "gelu_pytorch_tanh", f"{where}: vision_config")
    ids = ("image_token_id", "vision_start_token_id", "vision_end_token_id")
    towers = {
        "text": _fields(text, TextTowerConfig, _TEXT_NAMES)
        | _rope(text, ("default", "mrope"), f"{where}: text_config"),
        "vision": _fields(vision, VisionTowerConfig, _VISION_NAMES)
        | _rope(vision, ("axial",), f"{where}: vision_config"),
    }
    return from_dict(QwenVLConfig, towers | {key: mapping[key] for key in ids if key in mapping}, where)


# Our field name: the name in config.json, where they differ.
_TEXT_NAMES = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
}
_VISION_NAMES = {"deepstack_indexes": "deepstack_visual_indexes"}


def _fields(section: Mapping[str, Any], cls: type, names: Mapping[str, str]) -> dict[str, Any]:
    """What a section of config.json says of the fields of `cls`, under our names."""
    pairs = ((field.name, names.get(field.name, field.name)) for field in dataclasses.fields(cls))
    return {ours: section[theirs] for ours, theirs in pairs if theirs in section}


def _rope(section: Mapping[str, Any], kinds: tuple[str, ...], where: str) -> dict[str, Any]:
    """The rotary fields; transformers 5 writes rope_parameters, 4 rope_scaling with rope_theta beside it."""
    rope = {**(section.get("rope_scaling") or {}), **(section.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", kinds[0]))
    if kind not in kinds:
        raise UserError(f"{where}.rope_parameters.rope_type is {kind!r}; only {kinds[0]!r} is supported")
    return {key: rope[key] for key in ("rope_theta", "mrope_section") if key in rope}


def _section(mapping: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    if not isinstance(mapping.get(key), Mapping):
        raise UserError(f"{where}: {key} is missing; it must be an object with the sizes of that tower")
    return mapping[key]


def _require(section: Mapping[str, Any], key: str, value: Any, where: str) -> None:
    if section.get(key, value) != value:
        raise UserError(f"{where}.{key} is {section[key]!r}; only {value!r} is supported")
