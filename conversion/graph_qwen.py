"""The export form of the Qwen3-VL text tower for prompts without a picture: `dreamlite_jax.models.qwen_vl.text`.

Padding stands at the end and attention is causal, so no mask is needed: what a kept token sees is kept. Positions count
from 0, so that the rotation is a constant.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dreamlite_jax.errors import UserError
from dreamlite_jax.models.blocks import MASK_BIAS
from dreamlite_jax.models.qwen_vl import rope
from dreamlite_jax.models.qwen_vl.config import TextTowerConfig

from .graph_ops import GATE_SCALE, Array, Node, attend, dense, embedding_lookup, export_layout, rms_norm, scoped, silu


def tower_params(params: dict[str, Any], config: TextTowerConfig, tokens: int) -> dict[str, Any]:
    """The tower in export layout, with a branch for every layer and the constants that chats of `tokens` tokens need.

    Args:
      params: parameter tree of `TextTower`, layers stacked; emptied on the way.

    Raises:
      UserError: a tower whose queries are not normalised (Qwen2-VL): only that of Qwen3-VL encodes prompts.
    """
    if not config.qk_norm:
        raise UserError("text_config has no norm of queries and keys; only Qwen3-VL's tower has an export form")
    stack = params.pop("layers")
    out = {
        "embed_tokens": {"embedding": np.asarray(params.pop("embed_tokens")["embedding"], np.float32)},
        **constants(config, tokens),
    }
    if config.final_norm:
        out["norm"] = export_layout(params.pop("norm"))
    for i in range(config.num_layers):
        layer = jax.tree.map(lambda leaf, i=i: np.array(leaf[i], np.float32), stack)
        # 1 / sqrt(head width) acts on the queries last; a product that could leave float16's range is held smaller.
        layer["self_attn"]["q_norm"]["scale"] *= np.float32(config.head_dim**-0.5)
        layer["mlp"]["up_proj"]["kernel"] *= np.float32(1 / GATE_SCALE)
        layer["mlp"]["down_proj"]["kernel"] *= np.float32(GATE_SCALE)
        out[f"layers_{i}"] = export_layout(layer)
    return out


def constants(config: TextTowerConfig, tokens: int) -> dict[str, np.ndarray]:
    """Rotation (1, s, 1, e) and causal scores (1, 1, r·s, s), for r query heads a key head."""
    positions = np.broadcast_to(np.arange(tokens), (3, 1, tokens))
    angles = rope.mrope(
        jnp.asarray(positions), config.head_dim, config.rope_theta, config.mrope_section, config.mrope_interleaved
    )
    cos, sin = (np.asarray(x)[:, :, None, :] for x in angles)
    causal = np.where(np.tril(np.ones((tokens, tokens), bool)), 0.0, MASK_BIAS).astype(np.float32)
    repeats = config.num_heads // config.num_kv_heads
    return {
        "cos": np.concatenate([cos, cos], -1),
        "sin": np.concatenate([-sin, sin], -1),
        "causal": np.tile(causal, (repeats, 1))[None, None],
    }


def tower(node: Node, config: TextTowerConfig, token_ids: Array, dropped: int) -> Array:
    """The last layer's states (b, s - dropped, d), normalised if `config.final_norm`, without the template's beginning.

    Args:
      token_ids: (b, s) int32, a whole chat, padded at its end.
    """
    b, s = token_ids.shape
    x = embedding_lookup(token_ids.reshape(b * s), node.sub("embed_tokens")["embedding"])
    x = x.reshape(b, s, config.hidden_size)
    for i in range(config.num_layers):
        x = _layer(node.sub(f"layers_{i}"), config, node, x)
    x = jax.lax.slice_in_dim(x, dropped, s, axis=1)
    return rms_norm(node.sub("norm"), x, config.norm_eps) if config.final_norm else x


@scoped
def _layer(node: Node, config: TextTowerConfig, root: Node, x: Array) -> Array:
    y = rms_norm(node.sub("input_layernorm"), x, config.norm_eps)
    x = x + _attention(node.sub("self_attn"), config, root, y)
    return x + _mlp(node.sub("mlp"), rms_norm(node.sub("post_attention_layernorm"), x, config.norm_eps))


@scoped
def _mlp(node: Node, x: Array) -> Array:
    return dense(node.sub("down_proj"), silu(dense(node.sub("gate_proj"), x)) * dense(node.sub("up_proj"), x))


@scoped
def _attention(node: Node, config: TextTowerConfig, root: Node, x: Array) -> Array:
    """The query heads of one key head are stacked as rows, so that both sides of a product have the same batch."""
    b, s, _ = x.shape
    groups, repeats, width = config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim

    def heads(name: str, count: int) -> Array:
        return dense(node.sub(name), x).reshape(b, s, count, width)

    def turned(name: str, y: Array) -> Array:
        y = rms_norm(node.sub(name), y, config.norm_eps)
        first, second = (jax.lax.slice_in_dim(y, i * width // 2, (i + 1) * width // 2, axis=3) for i in (0, 1))
        return y * root["cos"] + jnp.concatenate([second, first], -1) * root["sin"]

    q = turned("q_norm", heads("q_proj", config.num_heads)).transpose(0, 2, 1, 3)
    k = turned("k_norm", heads("k_proj", groups)).transpose(0, 2, 1, 3)
    v = heads("v_proj", groups).transpose(0, 2, 1, 3)
    y = attend(q.reshape(b, groups, repeats * s, width), k, v, root["causal"])
    y = y.reshape(b, config.num_heads, s, width).transpose(0, 2, 1, 3)
    return dense(node.sub("o_proj"), y.reshape(b, s, config.num_heads * width))
