"""What float16 arithmetic does to a trained model: python -m conversion.half --model DIR --litert LITERT_DIR.

LITERT_DIR is the float32 folder that `to_litert --component all` made of the model. A sampler runs it, and a few of the
inputs that each component met, spread over steps and branches, go through its graph again with every intermediate
rounded to float16: weights, inputs and the result of every operation. Sums inside one operation (of a matmul, a
convolution, a mean) are kept in float32, as the kernels of phones keep them. Prints the largest magnitude (float16 ends
at 65,504) and what is lost; an infinity or a NaN makes the exit code 1 and is named with its layer.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dreamlite_jax import cli, model_folder
from dreamlite_jax.errors import UserError
from dreamlite_jax.json_files import write_json

from . import exports, extras, graph, outputs, quantize, runtime
from .graph import CALLS, Graph, Sizes
from .parity import meaningful, relative_rms


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
            if equation.primitive.name in (*CALLS, "composite"):
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


def measure(model: Path, litert: Path, calls: int) -> dict[str, dict[str, Any]]:
    """What the inputs that a sampler met show, by component.

    Raises:
      UserError: `litert` is not the float32 folder of this model with every component.
    """
    config, manifest = model_folder.load_config(model), runtime.read_manifest(litert)
    if manifest["recipe"] != "fp32" or set(manifest["files"]) != set(graph.COMPONENTS):
        raise UserError(
            f"--litert {litert} is of recipe {manifest['recipe']} and holds {', '.join(manifest['files'])}; it must be "
            f"of fp32 and hold {', '.join(graph.COMPONENTS)}"
        )
    rows = {}
    for component, samples in quantize.visit(litert).items():
        params, text = exports.load(component, model, config)
        built = graph.build(component, config, params, Sizes(**manifest["sizes"]), text)
        chosen = samples.spread(calls)
        runs = [run_in_half(built, [inputs[port.name] for port in built.inputs]) for inputs in chosen.inputs]
        found = [meaningful(*pair) for pair in zip(chosen.inputs, (r.output for r in runs), strict=True)]
        peaks = {layer: max(r.peaks.get(layer, 0.0) for r in runs) for layer in runs[0].peaks}
        layer = max(peaks, key=peaks.__getitem__)
        rows[component] = {
            "calls": len(runs),
            "peak": peaks[layer],
            "layer": layer,
            "overflows": sorted({layer for r in runs for layer in r.overflows}),
            "relative_rms": float(np.max([relative_rms(*pair) for pair in zip(chosen.outputs, found, strict=True)])),
        }
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.documented("conversion.half", __doc__)
    parser.add_argument("--model", type=Path, required=True, help="model folder, or the workdir of a training run")
    parser.add_argument("--litert", type=Path, required=True, help="float32 folder that to_litert made of it")
    parser.add_argument("--calls", type=int, default=6, help="inputs a component")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if args.calls < 1:
        raise UserError(f"--calls is {args.calls}; it must be at least 1")
    outputs.check_file(args.output)
    extras.check("half", extras.LITERT)
    rows = measure(model_folder.find_model(args.model), args.litert, args.calls)
    for name, row in rows.items():
        print(
            f"{name:<12} {row['calls']:3d} calls  largest {row['peak']:8.1f} in {row['layer']}  "
            f"relative RMS {row['relative_rms']:.1e}  {'finite' if not row['overflows'] else 'NOT FINITE'}"
        )
        for layer in row["overflows"]:
            print(f"  an infinity or a NaN in {layer}")
    if args.output:
        write_json(args.output, rows)
    return 1 if any(row["overflows"] for row in rows.values()) else 0


if __name__ == "__main__":
    cli.run(main)
