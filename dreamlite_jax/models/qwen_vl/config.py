"""Architecture of the Qwen vision-language towers, read from the `config.json` of a transformers folder."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from dreamlite_jax.config import from_dict
from dreamlite_jax.errors import UserError

Family = Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]  # model_type in config.json


@dataclasses.dataclass(frozen=True)
class TextTowerConfig:
    """Causal decoder with grouped-query attention and multimodal rotary positions (M-RoPE).

    `qk_norm`, `qkv_bias` and `mrope_interleaved` are what tells Qwen3-VL (True, False, True) from Qwen2-VL and
    Qwen2.5-VL (False, True, False). `mrope_section` counts the rotary frequencies that follow time, row and column.
    `final_norm` is no part of a checkpoint's config: whether the tower's result is the last layer's output normalised.
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
    final_norm: bool = True

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
    """Vision transformer with axial RoPE; what the families do differently:

    | family     | norms | MLP         | positions       | attention                 | text tower gets            |
    |------------|-------|-------------|-----------------|---------------------------|----------------------------|
    | qwen2_vl   | layer | quick GELU  | rotary          | full                      | the last block's features  |
    | qwen2_5_vl | RMS   | gated, SiLU | rotary          | windows but `full_blocks` | the last block's features  |
    | qwen3_vl   | layer | tanh GELU   | rotary, learned | full                      | those and `deepstack` taps |

    `deepstack_indexes` are the blocks whose output also enters the first text layers, one block a layer.
    `num_position_embeddings` is the area of the square table of learned positions, `window_px` the side of a window.
    """

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    family: Family = "qwen3_vl"
    deepstack_indexes: tuple[int, ...] = ()
    full_blocks: tuple[int, ...] = ()
    window_px: int = 0
    patch_size: int = 16
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    in_channels: int = 3
    num_position_embeddings: int = 0
    rope_theta: float = 10000.0

    def __post_init__(self):
        if self.hidden_size % (4 * self.num_heads):
            raise UserError(
                f"vision_config.hidden_size {self.hidden_size} is not a multiple of 4 x num_heads {self.num_heads}; "
                "each head is rotated in quarters (sine and cosine of row and column)"
            )
        if (self.num_position_embeddings > 0) != (self.family == "qwen3_vl"):
            raise UserError(
                f"vision_config.num_position_embeddings is {self.num_position_embeddings}; qwen3_vl has learned "
                f"positions, the other families none, and this is {self.family}"
            )
        if self.position_side**2 != self.num_position_embeddings:
            raise UserError(
                f"vision_config.num_position_embeddings {self.num_position_embeddings} is not a square number"
            )
        for name, blocks in (
            ("deepstack_visual_indexes", self.deepstack_indexes),
            ("fullatt_block_indexes", self.full_blocks),
        ):
            if list(blocks) != sorted(set(blocks)) or any(not 0 <= block < self.depth for block in blocks):
                raise UserError(
                    f"vision_config.{name} is {list(blocks)}; it must be increasing block numbers below "
                    f"depth {self.depth}"
                )
        unit_px = self.patch_size * self.spatial_merge_size
        windows = self.window_px >= unit_px and self.window_px % unit_px == 0
        if not (windows if self.family == "qwen2_5_vl" else self.window_px == 0):
            raise UserError(
                f"vision_config.window_size is {self.window_px}; qwen2_5_vl needs a multiple of {unit_px} pixels, the "
                f"other families have none, and this is {self.family}"
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
    def window_side(self) -> int:
        """Blocks of merged patches along a window; 0: no windows."""
        return self.window_px // (self.patch_size * self.spatial_merge_size)

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
    """Config of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint from its `config.json`, of transformers 4 or 5.

    Keys that do not change the hidden states (token ids of generation, dropout, initialiser) are ignored.

    Raises:
      UserError: another model type, a missing size, or a variant that the towers do not compute (the message names the
        key, its value and what is supported).
    """
    family = mapping.get("model_type")
    if family not in _ACTIVATIONS:
        raise UserError(f"{where}: model_type is {family!r}; it must be one of {', '.join(map(repr, _ACTIVATIONS))}")
    flat = family != "qwen3_vl" and "text_config" not in mapping  # transformers 4 had the text's sizes at the top
    text = mapping if flat else _section(mapping, "text_config", where)
    vision = _section(mapping, "vision_config", where)
    in_text, in_vision = (where if flat else f"{where}: text_config"), f"{where}: vision_config"
    _require(text, "hidden_act", "silu", in_text)
    _require(text, "attention_bias", False, in_text)
    _require(text, "use_sliding_window", False, in_text)
    _require(vision, "hidden_act", _ACTIVATIONS[family], in_vision)
    ids = ("image_token_id", "vision_start_token_id", "vision_end_token_id")
    towers = {
        "text": _text_variant(text, family) | _fields(text, TextTowerConfig, _TEXT_NAMES)
        | _rope(text, ("default", "mrope"), in_text),
        "vision": {"family": family} | _vision_fields(vision, family) | _rope(vision, ("axial",), in_vision),
    }  # fmt: skip
    return from_dict(QwenVLConfig, towers | {key: mapping[key] for key in ids if key in mapping}, where)


_ACTIVATIONS: dict[str, str] = {"qwen2_vl": "quick_gelu", "qwen2_5_vl": "silu", "qwen3_vl": "gelu_pytorch_tanh"}


def _text_variant(text: Mapping[str, Any], family: str) -> dict[str, Any]:
    """What config.json leaves to the family, and the width of a head, which may be missing."""
    newest = family == "qwen3_vl"
    variant: dict[str, Any] = {"mrope_interleaved": newest, "qk_norm": newest, "qkv_bias": not newest}
    if not newest and {"hidden_size", "num_attention_heads"} <= text.keys():
        variant["head_dim"] = text["hidden_size"] // text["num_attention_heads"]
    return variant


def _vision_fields(vision: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Sizes of the vision tower; Qwen2-VL calls the text's width hidden_size and its own embed_dim."""
    fields = {} if family == "qwen3_vl" else {"patch_size": 14}  # transformers 4 leaves out what is the family's own
    fields |= _fields(vision, VisionTowerConfig, _VISION_NAMES)
    if family == "qwen2_vl" and {"embed_dim", "hidden_size"} <= vision.keys():
        width = vision["embed_dim"]
        hidden = int(width * vision.get("mlp_ratio", 4))
        fields |= {"hidden_size": width, "out_hidden_size": vision["hidden_size"], "intermediate_size": hidden}
    return fields


# Our field name: the name in config.json, where they differ.
_TEXT_NAMES = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
}
_VISION_NAMES = {
    "deepstack_indexes": "deepstack_visual_indexes",
    "full_blocks": "fullatt_block_indexes",
    "window_px": "window_size",
}


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
