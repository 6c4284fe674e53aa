"""Which layer a converter cannot take: every layer of a graph is converted by itself, equal ones once."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from .graph import CALLS, Graph, Port


def culprits(graph: Graph, convert: Callable[[Graph, Path], None], most: int = 3) -> list[str]:
    """Names of the first layers whose operations alone fail to convert, each with its operations.

    Args:
      convert: writes a graph to a path or raises. A layer's weights are inputs here: they play no part in what a
        converter accepts, and the smaller graph is quick.
      most: layers to find before stopping.
    """
    found: list[str] = []
    known: dict[str, bool] = {}
    with tempfile.TemporaryDirectory() as folder:
        for layer, equations, function, inputs in _layers(graph):
            key = f"{equations}{[(v.aval.shape, v.aval.dtype) for v in inputs]}"
            if key not in known:
                known[key] = _fails(function, inputs, convert, Path(folder) / "layer.tflite")
            if known[key]:
                found.append(f"{layer or graph.component} ({', '.join(dict.fromkeys(equations))})")
            if len(found) == most:
                break
    return found


def _fails(function: Callable, inputs: list[Any], convert: Callable[[Graph, Path], None], path: Path) -> bool:
    ports = tuple(Port(f"x{i}", v.aval.shape, str(v.aval.dtype), "") for i, v in enumerate(inputs))
    output = Port("y", (1,), "float32", "")
    try:
        convert(Graph("unet", ports, output, {"none": np.zeros(1, np.float32)}, function), path)
    except Exception:  # whatever a converter raises is what we look for
        return True
    return False


def _layers(graph: Graph) -> Iterator[tuple[str, list[str], Callable, list[Any]]]:
    """(name, names of operations, function of weights and inputs, input variables) of each run of equal scopes."""
    shapes = [jax.ShapeDtypeStruct(port.shape, port.dtype) for port in graph.inputs]
    closed = jax.make_jaxpr(graph.apply)(graph.params, *shapes)
    jaxpr = closed.jaxpr
    constants = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    runs: list[list[Any]] = []
    for equation in jaxpr.eqns:
        scope = str(equation.source_info.name_stack)
        if runs and str(runs[-1][-1].source_info.name_stack) == scope:
            runs[-1].append(equation)
        else:
            runs.append([equation])
    for equations in runs:
        yield _part(jaxpr, equations, constants)


def _part(jaxpr: Any, equations: list[Any], constants: dict[Any, Any]) -> tuple[str, list[str], Callable, list[Any]]:
    made = {v for equation in equations for v in equation.outvars}
    read = dict.fromkeys(v for e in equations for v in e.invars if not hasattr(v, "val") and v not in made)
    inputs = [v for v in read if v not in constants]
    held = [v for v in read if v in constants]
    outputs = [v for equation in equations for v in equation.outvars if type(v).__name__ != "DropVar"]
    part = jaxpr.replace(eqns=equations, invars=inputs, constvars=held, outvars=outputs, debug_info=None, effects=set())

    def function(_: Any, *args: jax.Array) -> jax.Array:
        results = jax.core.eval_jaxpr(part, [constants[v] for v in held], *args)
        return jnp.stack([x.astype(jnp.float32).sum() for x in results]).sum()[None]

    names = [name for equation in equations for name in _operations(equation)]
    return str(equations[0].source_info.name_stack), names, function, inputs


def _operations(equation: Any) -> Iterator[str]:
    """Names of the operations, those inside of calls too."""
    if equation.primitive.name not in CALLS:
        yield equation.primitive.name
        return
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
        for each in getattr(inner, "jaxpr", inner).eqns:
            yield from _operations(each)
