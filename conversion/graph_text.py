"""The export form of the MiniLM text encoder: the same walk as `dreamlite_jax.models.minilm`."""

from typing import Any

import numpy as np

from dreamlite_jax.models.minilm import MiniLMConfig

from .graph_ops import Array, Node, attend, dense, embedding_lookup, gelu, layer_norm, scoped


def fold_positions(tree: dict[str, Any], batch: int, text_length: int) -> None:
    """Replaces the tables of positions and segments by the one constant (b, s, 1, d) that b texts of s tokens read."""
    embeddings = tree["embeddings"]
    positions = np.asarray(embeddings.pop("position_embeddings")["embedding"])
    segments = np.asarray(embeddings.pop("token_type_embeddings")["embedding"])
    embeddings["offset"] = np.tile((positions[:text_length] + segments[:1])[None, :, None], (batch, 1, 1, 1))


def minilm(node: Node, config: MiniLMConfig, token_ids: Array, text_bias: Array) -> Array:
    """Token states (b, s, d).

    Args:
      token_ids: (b, s) int32, padded.
      text_bias: (b, s) float32, 0 for a token and -10000 for padding.
    """
    x = _embed(node.sub("embeddings"), config, token_ids)
    bias = text_bias[:, None, None, :]
    encoder = node.sub("encoder")
    for i in range(config.num_hidden_layers):
        x = _layer(encoder.sub(f"layer_{i}"), config, x, bias)
    return x


@scoped
def _embed(node: Node, config: MiniLMConfig, token_ids: Array) -> Array:
    b, s = token_ids.shape
    words = embedding_lookup(token_ids.reshape(b * s), node.sub("word_embeddings")["embedding"])
    # In four dimensions, because a GPU adds a constant (s, d) wrongly and the converter would drop a third.
    x = (words.reshape(b, s, 1, config.hidden_size) + node["offset"]).reshape(b, s, config.hidden_size)
    return layer_norm(node.sub("LayerNorm"), x, config.layer_norm_eps)


@scoped
def _layer(node: Node, config: MiniLMConfig, x: Array, bias: Array) -> Array:
    x = _attention(node.sub("attention"), config, x, bias)
    return _add_norm(node.sub("output"), config, _intermediate(node.sub("intermediate"), x), x)


@scoped
def _attention(node: Node, config: MiniLMConfig, x: Array, bias: Array) -> Array:
    return _add_norm(node.sub("output"), config, _self_attention(node.sub("self"), config, x, bias), x)


@scoped
def _intermediate(node: Node, x: Array) -> Array:
    return gelu(dense(node.sub("dense"), x))


@scoped
def _add_norm(node: Node, config: MiniLMConfig, x: Array, residual: Array) -> Array:
    return layer_norm(node.sub("LayerNorm"), residual + dense(node.sub("dense"), x), config.layer_norm_eps)


@scoped
def _self_attention(node: Node, config: MiniLMConfig, x: Array, bias: Array) -> Array:
    b, s, _ = x.shape

    def heads(name: str) -> Array:
        y = dense(node.sub(name), x).reshape(b, s, config.num_attention_heads, config.head_dim)
        return y.transpose(0, 2, 1, 3)

    mixed = attend(heads("query"), heads("key"), heads("value"), bias)
    return mixed.transpose(0, 2, 1, 3).reshape(b, s, config.hidden_size)
