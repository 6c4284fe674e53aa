"""A number of a state's bits that does not depend on how the state is spread over devices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def fingerprint(parts: dict[str, Any]) -> dict[str, int]:
    """A number below 2^32 of every part of a state, over all bits of all its arrays.

    Sums modulo 2^32 of words times odd numbers that depend on their place: exact in any order of summation, so equal
    on every mesh, and different for any single changed word; other changes go unseen once in 2^32 times or so.
    """
    return {name: _of_tree(tree) for name, tree in parts.items()}


def _of_tree(tree: Any) -> int:
    # One array after the other: several programs under way at once would let processes wait for each other for ever.
    return sum((2 * i + 1) * int(_of_array(leaf)) for i, leaf in enumerate(jax.tree.leaves(tree))) % 2**32


# One small program for all arrays of a shape: a program of a whole state takes a minute or more to compile.
@jax.jit
def _of_array(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        words = x.astype(jnp.uint32)
    else:
        unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
        words = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        stride = int(np.prod(x.shape[axis + 1 :], dtype=np.int64)) % 2**32
        place = place + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * np.uint32(stride)
    mixed = place * np.uint32(0x9E3779B1)  # multipliers of neighbours have nothing to do with each other
    mixed = (mixed ^ (mixed >> np.uint32(15))) * np.uint32(0x85EBCA6B)
    return (words * ((mixed ^ (mixed >> np.uint32(13))) | np.uint32(1))).sum(dtype=jnp.uint32)
