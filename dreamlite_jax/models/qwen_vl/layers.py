"""What both towers are made of: norms, grouped-query attention, and a stack of equal blocks run by one scan."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from dreamlite_jax.types import Array, Float

MASKED = -1e30  # additive score of a forbidden pair; finite, so that a fully masked row gives numbers and no NaN

Params = Any  # a pytree of arrays


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis, in float32 up to the learned scale."""

    eps: float
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return scale.astype(x.dtype) * y.astype(x.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, in float32."""

    eps: float
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


class GatedMLP(nn.Module):
    """SwiGLU."""

    features: int
    use_bias: bool
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, self.use_bias, self.dtype, param_dtype=self.param_dtype, name=name)

        hidden = nn.silu(dense(self.features, "gate_proj")(x)) * dense(self.features, "up_proj")(x)
        return dense(x.shape[-1], "down_proj")(hidden)


def attention(
    q: Float[Array, "b s k e"], k: Float[Array, "b t g e"], v: Float[Array, "b t g e"], bias: Array | None = None
) -> Float[Array, "b s k e"]:
    """Softmax attention with k query heads over g key heads (k a multiple of g); scores and softmax in float32.

    Args:
      bias: added to the scores, broadcast against (b, g, k / g, s, t).
    """
    batch, queries, heads, width = q.shape
    groups = k.shape[2]
    grouped = q.reshape(batch, queries, groups, heads // groups, width)
    scores = jnp.einsum("bsgre,btge->bgrst", grouped, k, preferred_element_type=jnp.float32) * width**-0.5
    if bias is not None:
        scores = scores + bias
    mixed = jnp.einsum("bgrst,btge->bsgre", jax.nn.softmax(scores, -1).astype(v.dtype), v)
    return mixed.reshape(batch, queries, heads, width)


def init_stack(key: Array, block: nn.Module, depth: int, *inputs: Any) -> Params:
    """Parameters of `depth` copies of `block`, each leaf stacked on a new first axis."""
    return jax.vmap(lambda key: block.init(key, *inputs)["params"])(jax.random.split(key, depth))


def run_stack(
    block: nn.Module,
    params: Params,
    x: Float[Array, "b s d"],
    *inputs: Any,
    blocks: tuple[int, int],
    added: Float[Array, "n b s d"] | None = None,
    remat: bool = False,
    sharding: NamedSharding | None = None,
) -> Float[Array, "b s d"]:
    """`x` through blocks [first, stop) of a stack, as one scan: compile time does not grow with depth.

    Args:
      inputs: further arguments of the block, the same for all.
      added: one array a block, added to its output (deepstack).
      remat: recompute each block in the backward pass instead of keeping its activations.
      sharding: of the batch axis; pins the activations between blocks, and a block's parameters are gathered for it:
        left to itself the partitioner splits matrix products, and moves activations for it (all-to-all).
    """

    def step(x: Array, scanned: tuple[Array, Array | None]) -> tuple[Array, None]:
        index, extra = scanned
        # Indexed here, not scanned over: a slice of the stack as scan input would be a copy of its weights.
        layer = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), params)
        if sharding is not None:
            layer = jax.lax.with_sharding_constraint(layer, NamedSharding(sharding.mesh, PartitionSpec()))
        y = block.apply({"params": layer}, x, *inputs)
        y = y if extra is None else y + extra
        return (y if sharding is None else jax.lax.with_sharding_constraint(y, sharding)), None

    step = jax.checkpoint(step, prevent_cse=False) if remat else step
    return jax.lax.scan(step, x, (jnp.arange(*blocks), added))[0]
