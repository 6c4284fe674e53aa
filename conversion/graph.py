"""The export form of a model's components: static shapes, the same weights, the same numbers as the flax modules.

A `Graph` is a pure function of weights and named inputs, ready for a converter. Every shape is fixed by flags, every
tensor has at most four dimensions, and nothing in it is 64-bit.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax

from dreamlite_jax.config import ModelConfig, UNetConfig, check_image_size
from dreamlite_jax.errors import UserError
from dreamlite_jax.models.blocks import MASK_BIAS
from dreamlite_jax.models.minilm import MiniLMConfig
from dreamlite_jax.models.qwen_vl.config import TextTowerConfig
from dreamlite_jax.text.qwen_encoder import GENERATE_TOKENS
from dreamlite_jax.text.templates import GENERATE_CHAT

from . import graph_qwen, graph_text, graph_unet, graph_vae
from .graph_ops import Node, export_layout, half_safe, scale_queries

Component = Literal["unet", "vae_encoder", "vae_decoder", "text"]
COMPONENTS: tuple[Component, ...] = get_args(Component)
CALLS = ("pjit", "jit", "closed_call", "custom_jvp_call", "custom_vjp_call")  # operations that hold others in a jaxpr


@dataclasses.dataclass(frozen=True)
class Port:
    """One input or output of a graph; `below` is above every token id that an input takes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    meaning: str
    below: int | None = None


@dataclasses.dataclass(frozen=True)
class Graph:
    """A component with static shapes.

    Attributes:
      params: weights in export layout (`graph_ops.export_layout`).
      apply: (params, *inputs in the order of `inputs`) -> output.
    """

    component: Component
    inputs: tuple[Port, ...]
    output: Port
    params: Mapping[str, Any]
    apply: Callable[..., jax.Array]

    @property
    def weight_bytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The static shapes of an export, and the choices that change its operations but no number.

    Attributes:
      height, width: pixels of one panel.
      text_length: tokens a prompt is padded to.
      batch: rows of every input; guidance branches can be rows of one call or calls of one row.
      attention_chunk: query rows computed at a time, 0 for all; bounds the memory of the attention scores.
      half_safe: whether norms are written so that activations above 256 survive float16 arithmetic.
    """

    height: int
    width: int
    text_length: int
    batch: int = 1
    attention_chunk: int = 0
    half_safe: bool = False

    def check(self, config: ModelConfig) -> None:
        """Raises `UserError` for a shape that the network cannot take."""
        check_image_size(config, self.width, self.height)
        if not 1 <= self.text_length <= config.text.max_length:
            raise UserError(
                f"text_length is {self.text_length}; this model was trained with prompts of 1 to "
                f"{config.text.max_length} tokens"
            )
        if self.batch < 1:
            raise UserError(f"batch is {self.batch}; it must be at least 1")
        if self.attention_chunk < 0:
            raise UserError(f"attention_chunk is {self.attention_chunk}; it must be 0 (all rows at once) or positive")

    @property
    def chat_length(self) -> int:
        """States of a chat without a picture; only edits can have more."""
        return min(self.text_length, GENERATE_TOKENS)

    def latent(self, config: ModelConfig) -> tuple[int, int]:
        """Latent height and width of one panel."""
        return self.height // config.vae.downsampling, self.width // config.vae.downsampling


def build(
    component: Component,
    config: ModelConfig,
    params: dict[str, Any],
    sizes: Sizes,
    text: MiniLMConfig | TextTowerConfig | None = None,
) -> Graph:
    """The graph of one component.

    Args:
      params: the flax parameter tree of U-Net, VAE or text encoder (of Qwen3-VL its text tower); emptied on the way.
      text: config of the text encoder; for component "text".

    Raises:
      UserError: sizes the network cannot take.
    """
    sizes.check(config)
    if component == "unet":
        graph = _unet(config, params, sizes)
    elif component == "text" and isinstance(text, TextTowerConfig):
        graph = _qwen(text, params, sizes)
    elif component == "text":
        graph = _text(text or MiniLMConfig(), params, sizes)
    else:
        graph = _vae(component, config, params, sizes)

    def apply(*args: Any) -> jax.Array:
        with half_safe(sizes.half_safe):
            return graph.apply(*args)

    return dataclasses.replace(graph, apply=apply)


def _unet(config: ModelConfig, params: dict[str, Any], sizes: Sizes) -> Graph:
    unet, b, s = config.unet, sizes.batch, sizes.text_length
    h, w = sizes.latent(config)
    columns = 2 * w if unet.condition_layout == "width" else w
    layout = "[noisy target | condition] joined on " + unet.condition_layout
    inputs = (
        Port("sample", (b, h, columns, unet.in_channels), "float32", f"latent canvas, {layout}"),
        Port(
            "time_features",
            (b, unet.block_out_channels[0]),
            "float32",
            "[cos, sin] of t / 10000^(i/half), t = 1000 sigma, i = 0..half-1",
        ),
        Port(
            "size_features",
            (b, 2 * unet.size_embed_dim),
            "float32",
            "the same of the panel's width in pixels, then of its height",
        ),
        Port("text", (b, s, unet.text_dim), "float32", "states of the text encoder; zeros at padding"),
        Port("text_bias", (b, s), "float32", f"0 for a token, {MASK_BIAS:g} for padding"),
    )
    output = Port("velocity", (b, h, columns, unet.out_channels), "float32", "of the canvas; use the target's half")

    def apply(params: Any, *args: jax.Array) -> jax.Array:
        return graph_unet.unet(Node("unet", params), unet, *args, attention_chunk=sizes.attention_chunk)

    _scale_unet_queries(params, unet)
    return Graph("unet", inputs, output, export_layout(params), apply)


def _scale_unet_queries(params: dict[str, Any], unet: UNetConfig) -> None:
    """Puts 1 / sqrt(head width) of every level into what acts on its queries last: their norm, or the projection."""
    last = unet.levels - 1
    stages = [(f"down_blocks_{level}", level) for level in range(unet.levels)]
    stages += [("mid_block", last)] + [(f"up_blocks_{i}", last - i) for i in range(unet.levels)]
    for stage, level in stages:
        head_width = unet.block_out_channels[level] // unet.num_heads[level]
        scale_queries(params[stage], "norm_q" if unet.qk_norm else "to_q", head_width**-0.5)


def _vae(component: Component, config: ModelConfig, params: dict[str, Any], sizes: Sizes) -> Graph:
    part = component.removeprefix("vae_")
    h, w = sizes.latent(config)
    image = Port("image", (sizes.batch, sizes.height, sizes.width, 3), "float32", "RGB in [-1, 1]")
    latent = Port("latents", (sizes.batch, h, w, config.vae.latent_channels), "float32", "normalised latents")
    if component == "vae_decoder":
        graph_vae.fold_range(params[part])
    params = {part: export_layout(params[part])}
    if component == "vae_encoder":
        return Graph(component, (image,), latent, params, lambda p, x: graph_vae.encode(Node("vae", p), config.vae, x))
    return Graph(component, (latent,), image, params, lambda p, x: graph_vae.decode(Node("vae", p), config.vae, x))


def _text(config: MiniLMConfig, params: dict[str, Any], sizes: Sizes) -> Graph:
    b, s = sizes.batch, sizes.text_length
    graph_text.fold_positions(params, b, s)
    scale_queries(params["encoder"], "query", config.head_dim**-0.5)
    inputs = (
        Port("token_ids", (b, s), "int32", "[CLS] words [SEP], padded with [PAD]", config.vocab_size),
        Port("text_bias", (b, s), "float32", f"0 for a token, {MASK_BIAS:g} for padding"),
    )
    output = Port("states", (b, s, config.hidden_size), "float32", "last hidden states; set those of padding to zero")
    return Graph(
        "text",
        inputs,
        output,
        export_layout(params),
        lambda p, *args: graph_text.minilm(Node("text", p), config, *args),
    )


def _qwen(config: TextTowerConfig, params: dict[str, Any], sizes: Sizes) -> Graph:
    dropped, kept = GENERATE_CHAT.dropped_tokens, sizes.chat_length
    tokens = dropped + kept
    meaning = "the whole chat of a prompt without a picture, padded at its end with any id"
    inputs = (Port("token_ids", (sizes.batch, tokens), "int32", meaning, config.vocab_size),)
    which = "after" if config.final_norm else "before"
    meaning = f"states {which} the final norm, without the template's first {dropped}; set those of padding to zero"
    output = Port("states", (sizes.batch, kept, config.hidden_size), "float32", meaning)
    return Graph(
        "text",
        inputs,
        output,
        graph_qwen.tower_params(params, config, tokens),
        lambda p, ids: graph_qwen.tower(Node("text", p), config, ids, dropped),
    )
