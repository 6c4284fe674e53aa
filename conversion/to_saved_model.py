"""Converts a model folder to TensorFlow SavedModels: python -m conversion.to_saved_model --model DIR --output DIR.

The same graphs as the LiteRT ones, in float32: signature, inputs, outputs and their order are those of README.md here,
and so are model.json and tokenizer.json. Each SavedModel is run by TensorFlow, in a process without JAX, beside the JAX
model before the folder appears; a floor that is missed makes the exit code 1. Needs the extra [tensorflow].
"""

import dataclasses
import functools
import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dreamlite_jax import cli, model_folder
from dreamlite_jax.config import ModelConfig

from . import exports, extras, graph, litert, outputs, parity, resources, saved_model
from .graph import Sizes

FORMAT = "dreamlite-saved-model"


def main(argv: Sequence[str] | None = None) -> int:
    args = exports.parser("conversion.to_saved_model", __doc__).parse_args(argv)
    extras.check("to_saved_model", extras.TO_SAVED_MODEL, "tensorflow")
    model = model_folder.find_model(args.model)
    config = model_folder.load_config(model)
    sizes = exports.sizes_of(args, config)
    components = exports.components_of(args, model, config)
    exports.check_resources(exports.weight_bytes(model, config, components), args.output)
    rows = {}
    with outputs.new_folder(args.output, replace=args.replace) as folder:
        files = {component: component for component in components}
        exports.write_manifest(model, config, sizes, files, folder, format=FORMAT)
        for component in components:
            rows[component] = convert_one(component, model, config, sizes, folder)
            gc.collect()
        report = {"components": rows, "passed": all(row["parity"]["passed"] for row in rows.values())}
        exports.write_report(folder, args, extras.installed("tensorflow", "tensorflow-cpu"), report)
    return exports.conclude(args, table(rows), report)


def convert_one(component: str, model: Path, config: ModelConfig, sizes: Sizes, folder: Path) -> dict[str, Any]:
    """One component: its SavedModel in `folder`, and its part of the report."""
    begin = time.perf_counter()
    params, text = exports.load(component, model, config)
    built = graph.build(component, config, params, sizes, text)
    path = folder / component
    ports = {"inputs": litert.describe(built.inputs), "outputs": litert.describe([built.output])}
    saved_model.convert(built, path)
    del built, params
    gc.collect()
    seconds, peak = time.perf_counter() - begin, resources.peak_memory_bytes()
    load = functools.partial(exports.load, component, model, config)
    opened = saved_model.Opened(path)
    compared = parity.compare(component, config, sizes, load, lambda: opened, parity.FLOORS["fp32"])
    return {
        "file": path.name,
        "file_bytes": resources.bytes_of([path]),
        "seconds": seconds,
        "parity": dataclasses.asdict(compared),
        "peak_memory_so_far_bytes": peak,  # of the whole command until here, before this component is compared
        "run_peak_memory_bytes": opened.peak_memory_bytes,  # of the process that ran it
        **ports,
    }


def table(rows: dict[str, Any]) -> str:
    """One line a component."""
    lines = [f"{'component':<12} {'MB':>8} {'run MB':>8} {'seconds':>8} {'max abs':>9} {'rel rms':>9}  floor"]
    for name, row in rows.items():
        lines.append(
            f"{name:<12} {row['file_bytes'] / 1e6:8.1f} {row['run_peak_memory_bytes'] / 1e6:8.1f} "
            f"{row['seconds']:8.1f} {row['parity']['max_abs']:9.1e} {row['parity']['relative_rms']:9.1e}  "
            f"{'ok' if row['parity']['passed'] else 'MISSED'}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
