"""Converts a model folder to LiteRT: python -m conversion.to_litert --model DIR --output DIR.

Writes one .tflite file a component, what `conversion.runtime` needs beside them (model.json, tokenizer.json), and
report.json. Each file is compared with the JAX model before the folder appears; a floor that is missed makes the exit
code 1, and the folder stays for inspection, its report saying so.
"""

import argparse
import dataclasses
import gc
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dreamlite_jax import cli, model_folder
from dreamlite_jax.config import ModelConfig, to_dict
from dreamlite_jax.errors import UserError
from dreamlite_jax.models.blocks import MASK_BIAS
from dreamlite_jax.text import templates

from . import audit, delegates, exports, graph, litert, parity, quantize, text_parts
from .graph import COMPONENTS, Sizes
from .quantize import RECIPES, check_target
from .runtime import FORMAT, FORMAT_VERSION, Runtime, peak_memory_bytes

TARGETS = ("gpu", "npu", "cpu")
PROMPT = "a red car and a yellow star on a blue background"  # of the picture that is compared


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = exports.parser("conversion.to_litert", __doc__)
    parser.add_argument("--recipe", choices=RECIPES, default="fp32")
    parser.add_argument("--target", choices=TARGETS, default="gpu")
    parser.add_argument(
        "--attention_chunk", type=int, default=0, help="query rows of attention at a time, 0: all; bounds its memory"
    )
    parser.add_argument(
        "--half_safe",
        choices=("auto", "on", "off"),
        default="auto",
        help="norms that survive float16 arithmetic, for two more passes each; auto: unless the target is cpu",
    )
    parser.add_argument("--calibration_samples", type=int, default=32, help="network calls that int8_static looks at")
    parser.add_argument("--sensitivity", action="store_true", help="report what each module loses under W8A8 (slow)")
    parser.add_argument(
        "--accelerators",
        action="store_true",
        help="ask the GPU accelerator and the NPU compiler what they run, where they can start; else a table of rules",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    model = model_folder.find_model(args.model)
    config = model_folder.load_config(model)
    half_safe = args.target != "cpu" if args.half_safe == "auto" else args.half_safe == "on"
    sizes = exports.sizes_of(args, config, attention_chunk=args.attention_chunk, half_safe=half_safe)
    check_target(args.recipe, args.target)
    if args.calibration_samples < 1:
        raise UserError(f"--calibration_samples is {args.calibration_samples}; it must be at least 1")
    if args.recipe == "int8_static" and (args.component not in ("all", "text") or config.text.encoder != "minilm"):
        raise UserError(
            "--recipe int8_static is calibrated on what the sampler visits, which needs every component, the text "
            "encoder (MiniLM) among them; use --component all"
        )
    components = exports.components_of(args, model, config)
    weights = weight_bytes(model, config, components)
    litert.check_resources(weights, args.output)
    print(
        f"{sum(weights.values()) / 1e6:.0f} MB of weights; about "
        f"{litert.predicted_peak_bytes(max(weights.values())) / 1e9:.1f} GB of memory and "
        f"{litert.predicted_disk_bytes(weights) / 1e9:.1f} GB of disk at the peak",
        file=sys.stderr,
    )
    with model_folder.new_folder(args.output) as folder:
        report = convert_all(
            model,
            config,
            sizes,
            components,
            folder,
            args.recipe,
            args.target,
            args.calibration_samples,
            args.sensitivity,
            args.accelerators,
        )
        exports.write_report(folder, args, ("litert-converter", "ai-edge-litert", "ai-edge-quantizer"), report)
    return exports.conclude(args, table(report), report["passed"])


def weight_bytes(model: Path, config: ModelConfig, components: Sequence[str]) -> dict[str, int]:
    """Bytes of float32 weights of each component, read off the architecture.

    Raises:
      UserError: the model folder lacks a file that one of them needs.
    """
    sizes = {}
    for component in components:
        if component == "text":
            sizes[component] = text_parts.weight_bytes(model, config)
            continue
        part = "unet" if component == "unet" else "vae"
        file = model / model_folder.weight_file(part)
        if not file.is_file():
            raise UserError(f"model folder {model} lacks {file.name}, which {component} is made of")
        half = component.removeprefix("vae_") + "/" if part == "vae" else ""
        shapes = model_folder.expected_shapes(part, getattr(config, part))
        sizes[component] = 4 * sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(half))
    return sizes


def convert_all(
    model: Path,
    config: ModelConfig,
    sizes: Sizes,
    components: Sequence[str],
    folder: Path,
    recipe: str,
    target: str,
    calibration_samples: int = 32,
    sensitivity: bool = False,
    accelerators: bool = False,
) -> dict[str, Any]:
    """Converts, audits and compares the components into `folder`; returns the report."""
    manifest = write_manifest(model, config, sizes, components, folder, recipe, target)
    rows = {}
    for component in components:
        rows[component] = convert_one(component, model, config, sizes, folder, manifest)
        gc.collect()
    if recipe != "fp32":
        quantize_all(folder, manifest, rows, recipe, calibration_samples, sensitivity)
    report = {
        "components": rows,
        "model": str(model),
        "recipe": recipe,
        "target": target,
        "sizes": dataclasses.asdict(sizes),
        "attention_scores_bytes": attention_bytes(config, sizes),
    }
    found = {name: delegates.verdicts(folder / row["file"], accelerators=accelerators) for name, row in rows.items()}
    report["delegates"] = {name: [dataclasses.asdict(v) for v in answers] for name, answers in found.items()}
    report["delegates_table"] = delegates.table(found)
    whole = all(v.whole for answers in found.values() for v in answers if v.delegate == target)
    passed = whole and all(row_passed(row) for row in rows.values())
    if set(rows) == set(COMPONENTS):
        floor = parity.FLOORS[recipe].psnr_db
        params = {name: exports.load(name, model, config)[0] for name in ("unet", "vae")}
        params["text"], params["text_config"] = exports.load("text", model, config)
        psnr = parity.picture_psnr(config, params, Runtime(folder), PROMPT)
        report["picture"] = {"prompt": PROMPT, "steps": 4, "psnr_db": min(psnr, 200.0), "floor_db": floor}
        passed = passed and psnr >= floor
    report["peak_memory_bytes"] = peak_memory_bytes()
    report["passed"] = bool(passed)
    return report


def quantize_all(
    folder: Path,
    manifest: dict[str, Any],
    rows: dict[str, Any],
    recipe: str,
    calibration_samples: int,
    sensitivity: bool,
) -> None:
    """Replaces the float32 files by quantised ones and adds to each row what that changed.

    Where all components are there, the differences are those on inputs that the sampler met, else on random ones.
    """
    complete = set(rows) == set(COMPONENTS)
    visited = quantize.visit(folder) if complete else {}
    for component, row in rows.items():
        path = folder / manifest["files"][component]
        begin = time.perf_counter()
        floats = path.with_name(f".{path.name}.fp32")
        path.rename(floats)
        if complete:
            calibration, held_out = visited[component].split(calibration_samples)
        else:
            calibration, held_out = None, quantize.random_samples(floats)
        chosen = quantize.quantize(floats, path, component, recipe, calibration, held_out)
        if sensitivity and calibration is not None and component != "text":
            chosen["sensitivity"] = quantize.sensitivity(floats, calibration, held_out)
        found = audit.audit(path)
        compared = quantize.compare(path, held_out, parity.FLOORS[recipe])
        floats.unlink()
        row["quantized"] = {
            "file_bytes": found.file_bytes,
            "predicted_run_bytes": found.file_bytes + audit.activation_bytes(path),
            "ops": found.ops,
            "seconds": time.perf_counter() - begin,
            "parity_on": "inputs of the sampler" if complete else "random inputs",
            "parity": dataclasses.asdict(compared),
            **chosen,
        }
        row["faults"] += found.faults
        row["peak_memory_bytes"] = peak_memory_bytes()
        gc.collect()


def row_passed(row: dict[str, Any]) -> bool:
    """Whether a component reached every floor and has nothing that no delegate takes."""
    stages = [row, *([row["quantized"]] if "quantized" in row else [])]
    return not row["faults"] and all(stage["parity"]["passed"] for stage in stages)


def convert_one(
    component: str, model: Path, config: ModelConfig, sizes: Sizes, folder: Path, manifest: dict[str, Any]
) -> dict[str, Any]:
    """One component: its file in `folder`, and its part of the report."""
    begin = time.perf_counter()
    params, text = exports.load(component, model, config)
    built = graph.build(component, config, params, sizes, text)
    path = folder / manifest["files"][component]
    metadata = {key: manifest[key] for key in ("config", "sizes", "recipe", "target")}
    litert.convert(built, path, {"component": component, **metadata})
    ports = {"inputs": litert.describe(built.inputs), "outputs": litert.describe([built.output])}
    del built, params
    seconds, peak = time.perf_counter() - begin, peak_memory_bytes()
    found = audit.audit(path)
    params, text = exports.load(component, model, config)
    compared = parity.compare(component, config, sizes, params, folder, manifest, parity.FLOORS["fp32"], text)
    return {
        "file": path.name,
        "file_bytes": found.file_bytes,
        "seconds": seconds,
        "peak_memory_bytes": peak,  # without the comparison that follows
        "predicted_run_bytes": found.file_bytes + audit.activation_bytes(path),
        "ops": found.ops,
        "faults": list(found.faults),
        "parity": dataclasses.asdict(compared),
        **ports,
    }


def write_manifest(
    model: Path, config: ModelConfig, sizes: Sizes, components: Sequence[str], folder: Path, recipe: str, target: str
) -> dict[str, Any]:
    """model.json of the runtime, and the tokenizer beside it."""
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": to_dict(config),
        "sizes": dataclasses.asdict(sizes),
        "recipe": recipe,
        "target": target,
        "files": {component: f"{component}.tflite" for component in components},
        "templates": {"generate": templates.GENERATE_TAG, "edit": templates.EDIT_TAG, "null": ""},
        "mask_bias": MASK_BIAS,
        "start_noise": "threefry2x32 of key (0, seed), counter = index; see conversion/noise.py",
    }
    if "text" in components:
        manifest |= text_parts.write_tokenizer(model, config, folder)
    (folder / "model.json").write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
    return manifest


def attention_bytes(config: ModelConfig, sizes: Sizes) -> dict[str, int]:
    """Bytes of the largest self-attention's scores in float32: whole, and with the chunk of this export."""
    unet, (h, w) = config.unet, sizes.latent(config)
    columns = 2 * w if unet.condition_layout == "width" else w
    largest = (0, 0)
    last = unet.levels - 1
    kinds = [*enumerate(unet.down_blocks), (last, "self_cross"), *((last - i, k) for i, k in enumerate(unet.up_blocks))]
    for level, kind in kinds:
        tokens = (h >> level) * (columns >> level)
        rows = tokens * unet.num_heads[level]
        if kind == "self_cross" and rows * tokens > largest[0] * largest[1]:
            largest = (rows, tokens)
    rows, tokens = largest
    chunk = min(sizes.attention_chunk or rows, rows)
    return {"whole": 4 * sizes.batch * rows * tokens, "as_exported": 4 * sizes.batch * chunk * tokens}


def table(report: dict[str, Any]) -> str:
    """One line a component."""
    widths = {"component": -12, "MB": 8, "run MB": 8, "ops": 6, "seconds": 8, "peak GB": 8, "max abs": 9, "rel rms": 9}
    lines = [" ".join(f"{name:{'<' if w < 0 else '>'}{abs(w)}}" for name, w in widths.items()) + "  floor"]
    for name, row in report["components"].items():
        shown = {**row, **row.get("quantized", {})}
        lines.append(
            f"{name:<12} {shown['file_bytes'] / 1e6:8.1f} {shown['predicted_run_bytes'] / 1e6:8.1f} "
            f"{sum(shown['ops'].values()):6d} {shown['seconds']:8.1f} "
            f"{row['peak_memory_bytes'] / 1e9:8.2f} {shown['parity']['max_abs']:9.1e} "
            f"{shown['parity']['relative_rms']:9.1e}  {'ok' if row_passed(row) else 'MISSED'}"
        )
        lines += [f"  fault: {fault}" for fault in row["faults"][:10]]
        lines += [
            f"  W8A8 loses {loss['relative_rms']:.1e} in {loss['module']}" for loss in shown.get("sensitivity", [])[:5]
        ]
    if "picture" in report:
        picture = report["picture"]
        lines.append(
            f"picture, {picture['steps']} steps: {picture['psnr_db']:.1f} dB beside JAX "
            f"(floor {picture['floor_db']:g} dB)"
        )
    lines.append(report["delegates_table"])
    scores = report["attention_scores_bytes"]
    lines.append(
        f"largest attention scores: {scores['as_exported'] / 1e6:.1f} MB as exported, "
        f"{scores['whole'] / 1e6:.1f} MB whole"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
