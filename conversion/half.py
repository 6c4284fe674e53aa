"""A graph with every intermediate rounded to float16: does anything overflow, and what does precision cost?

Rounded are weights, inputs and the result of every operation. Sums inside one operation (of a matmul, a convolution, a
mean) are kept in float32, as the kernels of phones keep them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .graph import Graph

LARGEST = float(np.finfo(np.float16).max)
INLINED = ("pjit", "jit", "closed_call", "custom_jvp_call", "custom_vjp_call", "composite")


@dataclasses.dataclass
class HalfRun:
    """What a rounded run showed.

    Attributes:
      output: of the rounded graph, float32.
      peaks: largest finite magnitude of any intermediate, by layer.
      overflows: layers whose result held an infinity or a NaN, first come first.
    """

    output: np.ndarray
    peaks: dict[str, float]
    overflows: tuple[str, ...]

    @property
    def peak(self) -> float:
        return max(self.peaks.values())


def run_in_half(graph: Graph, inputs: Sequence[np.ndarray]) -> HalfRun:
    """Runs a graph operation by operation in rounded arithmetic. Slow: for small sizes."""
    shapes = [jax.ShapeDtypeStruct(port.shape, port.dtype) for port in graph.inputs]
    closed = jax.make_jaxpr(graph.apply)(graph.params, *shapes)
    walk = _Walk()
    leaves = [walk.rounded(jnp.asarray(leaf)) for leaf in jax.tree.leaves(graph.params)]
    (output,) = walk.run(closed.jaxpr, closed.consts, [*leaves, *(walk.rounded(jnp.asarray(x)) for x in inputs)], "")
    return HalfRun(np.asarray(output), walk.peaks, tuple(walk.overflows))


class _Walk:
    def __init__(self):
        self.peaks: dict[str, float] = {}
        self.overflows: dict[str, None] = {}

    def rounded(self, x: jax.Array) -> jax.Array:
        return x.astype(jnp.float16).astype(jnp.float32) if x.dtype == jnp.float32 else x

    def run(self, jaxpr: Any, constants: Sequence[Any], inputs: Sequence[jax.Array], scope: str) -> list[jax.Array]:
        environment = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *inputs), strict=True))

        sums: set[Any] = set()

        def read(atom: Any) -> Any:
            return atom.val if hasattr(atom, "val") else environment[atom]

        for equation in jaxpr.eqns:
            layer = "/".join(part for part in (scope, str(equation.source_info.name_stack)) if part)
            values = [read(atom) for atom in equation.invars]
            if equation.primitive.name in INLINED:
                inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
                outputs = self.run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), values, layer)
            else:
                result = equation.primitive.bind(*values, **equation.params)
                outputs = result if equation.primitive.multiple_results else [result]
                if self._inside_mean(equation, sums):
                    sums.update(equation.outvars)
                else:
                    outputs = [self.stored(x, layer) for x in outputs]
            environment.update(zip(equation.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    @staticmethod
    def _inside_mean(equation: Any, sums: set[Any]) -> bool:
        """Whether the result is the sum of a mean, on its way to the division: one operation of the runtime."""
        if equation.primitive.name == "reduce_sum":
            return True
        moves = equation.primitive.name in ("broadcast_in_dim", "reshape")
        return moves and not hasattr(equation.invars[0], "val") and equation.invars[0] in sums

    def stored(self, x: jax.Array, layer: str) -> jax.Array:
        """The result as float16 would keep it, with a note of its size."""
        if x.dtype != jnp.float32:
            return x
        x = self.rounded(x)
        size = np.abs(np.asarray(x))
        finite = np.isfinite(size)
        if not finite.all():
            self.overflows.setdefault(layer)
        self.peaks[layer] = max(self.peaks.get(layer, 0.0), float(size[finite].max(initial=0.0)))
        return x
