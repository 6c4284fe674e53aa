"""Converts a model folder to ONNX: python -m conversion.to_onnx --model DIR --output DIR.

The same graphs as the LiteRT ones: inputs, outputs and their order are those of README.md here, and so are model.json
and tokenizer.json. Each file is run by onnxruntime beside the JAX model before the folder appears; a floor that is
missed makes the exit code 1.
"""

import argparse
import collections
import dataclasses
import functools
import gc
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dreamlite_jax import cli, model_folder
from dreamlite_jax.config import ModelConfig

from . import exports, extras, graph, litert, onnx, outputs, parity, resources
from .graph import Sizes
from .onnx import OPSETS
from .onnx_session import open_session

FORMAT = "dreamlite-onnx"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = exports.parser("conversion.to_onnx", __doc__)
    parser.add_argument("--precision", choices=("fp32", "fp16"), default="fp32")
    parser.add_argument("--opset", type=int, default=OPSETS[1], help=f"{OPSETS[0]} to {OPSETS[1]}")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    extras.check("to_onnx", extras.TO_ONNX)
    model = model_folder.find_model(args.model)
    config = model_folder.load_config(model)
    half = args.precision == "fp16"
    sizes = exports.sizes_of(args, config, half_safe=half)
    onnx.check_opset(args.opset)
    components = exports.components_of(args, model, config)
    weights = exports.weight_bytes(model, config, components)
    exports.check_resources(weights, args.output, share=0.5 if half else 1.0)
    rows = {}
    with outputs.new_folder(args.output, replace=args.replace) as folder:
        files = {component: f"{component}.onnx" for component in components}
        more = {"format": FORMAT, "precision": args.precision, "opset": args.opset}
        exports.write_manifest(model, config, sizes, files, folder, **more)
        for component in components:
            rows[component] = convert_one(component, model, config, sizes, folder, args.opset, args.precision)
            gc.collect()
        report = {"components": rows, "passed": all(row["parity"]["passed"] for row in rows.values())}
        exports.write_report(folder, args, ("onnx", "onnxruntime"), report)
    return exports.conclude(args, table(rows), report)


def convert_one(
    component: str, model: Path, config: ModelConfig, sizes: Sizes, folder: Path, opset: int, precision: str
) -> dict[str, Any]:
    """One component: its file (and its weights file when large) in `folder`, and its part of the report."""
    begin = time.perf_counter()
    params, text = exports.load(component, model, config)
    built = graph.build(component, config, params, sizes, text)
    path = folder / f"{component}.onnx"
    ports = {"inputs": litert.describe(built.inputs), "outputs": litert.describe([built.output])}
    metadata = {"component": component, "precision": precision, "sizes": dataclasses.asdict(sizes), **ports}
    onnx.export(built, path, opset=opset, precision=precision, metadata=json.dumps(metadata))
    del built, params
    seconds, peak = time.perf_counter() - begin, resources.peak_memory_bytes()
    load = functools.partial(exports.load, component, model, config)
    compared = parity.compare(component, config, sizes, load, lambda: opened(path), parity.FLOORS[precision])
    return {
        "file": path.name,
        "file_bytes": sum(file.stat().st_size for file in folder.glob(f"{path.name}*")),
        "seconds": seconds,
        "ops": count_operations(path),
        "parity": dataclasses.asdict(compared),
        "peak_memory_so_far_bytes": peak,  # of the whole command until here, before this component is compared
        **ports,
    }


def opened(path: Path) -> Callable[..., np.ndarray]:
    """The file as a function of its inputs."""
    session = open_session(path)
    return lambda **inputs: session.run(None, inputs)[0]


def count_operations(path: Path) -> dict[str, int]:
    """Nodes by kind."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    return dict(collections.Counter(node.op_type for node in model.graph.node).most_common())


def table(rows: dict[str, Any]) -> str:
    """One line a component."""
    lines = [f"{'component':<12} {'MB':>8} {'nodes':>6} {'seconds':>8} {'max abs':>9} {'rel rms':>9}  floor"]
    for name, row in rows.items():
        lines.append(
            f"{name:<12} {row['file_bytes'] / 1e6:8.1f} {sum(row['ops'].values()):6d} {row['seconds']:8.1f} "
            f"{row['parity']['max_abs']:9.1e} {row['parity']['relative_rms']:9.1e}  "
            f"{'ok' if row['parity']['passed'] else 'MISSED'}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
