"""Converts a model folder to ONNX: python -m conversion.to_onnx --model DIR --output DIR.

The same graphs as the LiteRT ones: inputs, outputs and their order are those of README.md here. Each file is run by
onnxruntime beside the JAX model before the folder appears; a floor that is missed makes the exit code 1.
"""

import argparse
import collections
import dataclasses
import gc
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dreamlite_jax import cli, model_folder
from dreamlite_jax.config import ModelConfig

from . import exports, graph, litert, onnx, parity, text_parts
from .graph import Sizes
from .onnx import OPSETS
from .onnx_session import open_session
from .runtime import peak_memory_bytes


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = exports.parser("conversion.to_onnx", __doc__)
    parser.add_argument("--precision", choices=("fp32", "fp16"), default="fp32")
    parser.add_argument("--opset", type=int, default=OPSETS[1], help=f"{OPSETS[0]} to {OPSETS[1]}")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    model = model_folder.find_model(args.model)
    config = model_folder.load_config(model)
    sizes = exports.sizes_of(args, config)
    rows = {}
    with model_folder.new_folder(args.output) as folder:
        for component in exports.components_of(args, model, config):
            rows[component] = convert_one(component, model, config, sizes, folder, args.opset, args.precision)
            gc.collect()
        if "text" in rows:
            text_parts.write_tokenizer(model, config, folder)
        passed = all(row["parity"]["passed"] for row in rows.values())
        exports.write_report(folder, args, ("onnx", "onnxruntime"), {"components": rows, "passed": passed})
    return exports.conclude(args, table(rows), passed)


def convert_one(
    component: str, model: Path, config: ModelConfig, sizes: Sizes, folder: Path, opset: int, precision: str
) -> dict[str, Any]:
    """One component: its file (and its weights file when large) in `folder`, and its part of the report."""
    begin = time.perf_counter()
    params, text = exports.load(component, model, config)
    built = graph.build(component, config, params, sizes, text)
    litert.check_resources({component: built.weight_bytes}, folder)
    path = folder / f"{component}.onnx"
    ports = {"inputs": litert.describe(built.inputs), "outputs": litert.describe([built.output])}
    metadata = {"component": component, "precision": precision, "sizes": dataclasses.asdict(sizes), **ports}
    onnx.export(built, path, opset=opset, precision=precision, metadata=json.dumps(metadata))
    del built, params
    seconds = time.perf_counter() - begin
    return {
        "file": path.name,
        "file_bytes": sum(file.stat().st_size for file in folder.glob(f"{path.name}*")),
        "seconds": seconds,
        "ops": count_operations(path),
        "parity": dataclasses.asdict(compare(component, model, config, sizes, path, precision)),
        "peak_memory_bytes": peak_memory_bytes(),
        **ports,
    }


def count_operations(path: Path) -> dict[str, int]:
    """Nodes by kind."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    return dict(collections.Counter(node.op_type for node in model.graph.node).most_common())


def compare(component: str, model: Path, config: ModelConfig, sizes: Sizes, path: Path, precision: str) -> Any:
    """The file under onnxruntime beside the flax module, on the random inputs of `parity`."""
    params, text = exports.load(component, model, config)
    cases = [
        parity.case(component, config, sizes, text.vocab_size if text else 0, seed) for seed in range(parity.CASES)
    ]
    run = parity.reference(component, config, params, text)
    wanted = [run(*case.model) for case in cases]
    del params, run
    session = open_session(path)
    found = [session.run(None, case.graph)[0] for case in cases]
    wanted, found = parity.meaningful(cases, wanted), parity.meaningful(cases, found)
    return parity.measure(wanted, found, parity.FLOORS[precision])


def table(rows: dict[str, Any]) -> str:
    """One line a component."""
    lines = [
        f"{'component':<12} {'MB':>8} {'nodes':>6} {'seconds':>8} {'peak GB':>8} {'max abs':>9} {'rel rms':>9}  floor"
    ]
    for name, row in rows.items():
        lines.append(
            f"{name:<12} {row['file_bytes'] / 1e6:8.1f} {sum(row['ops'].values()):6d} {row['seconds']:8.1f} "
            f"{row['peak_memory_bytes'] / 1e9:8.2f} {row['parity']['max_abs']:9.1e} "
            f"{row['parity']['relative_rms']:9.1e}  {'ok' if row['parity']['passed'] else 'MISSED'}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
