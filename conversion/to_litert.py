"""Converts a model folder to LiteRT: python -m conversion.to_litert --model DIR --output DIR.

Writes one .tflite file a component, what `conversion.runtime` needs beside them (model.json, tokenizer.json), and
report.json. Each file is compared with the JAX model before the folder appears; a floor that is missed makes the exit
code 1, and the folder stays for inspection, its report saying so.
"""

import argparse
import dataclasses
import functools
import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dreamlite_jax import cli, model_folder
from dreamlite_jax.config import ModelConfig
from dreamlite_jax.errors import UserError

from . import audit, delegates, exports, extras, graph, litert, outputs, parity, quantize, resources, text_parts
from .graph import COMPONENTS, Sizes
from .quantize import CALIBRATION_EDITS, CALIBRATION_PROMPTS, RECIPES, check_target
from .runtime import FORMAT, Runtime, load_component

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
    extras.check("to_litert", extras.TO_LITERT)
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
    components = exports.components_of(args, model, config, litert.LARGEST_FILE)
    if args.sensitivity and (args.recipe == "fp32" or set(components) != set(COMPONENTS)):
        raise UserError(
            "--sensitivity is measured on what the sampler visits, beside a quantised file: it needs every component, "
            "and another --recipe than fp32"
        )
    if set(components) == set(COMPONENTS):
        check_prompts(model, config, sizes, args.recipe)
    weights = exports.weight_bytes(model, config, components)
    # While a file is quantised there is a second one beside it, and under --sensitivity a third, nearly float32.
    extra = 0.0 if args.recipe == "fp32" else 1.35 if args.sensitivity else 0.55
    exports.check_resources(weights, args.output, largest_file=litert.LARGEST_FILE, extra=extra)
    with outputs.new_folder(args.output, replace=args.replace) as folder:
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
    return exports.conclude(args, table(report), report)


def check_prompts(model: Path, config: ModelConfig, sizes: Sizes, recipe: str) -> None:
    """Raises `UserError` when a prompt that the conversion itself runs is longer than `text_length`."""
    prompts = [("generate", PROMPT)]
    if recipe != "fp32":
        prompts += [("generate", prompt) for prompt in CALIBRATION_PROMPTS]
        if config.text.encoder == "minilm":
            prompts += [("edit", prompt) for prompt in CALIBRATION_EDITS]
    longest = max(text_parts.token_counts(model, config, prompts))
    if longest > sizes.text_length:
        raise UserError(
            f"text_length is {sizes.text_length}; --recipe {recipe} with every component runs prompts of {longest} "
            f"tokens, so it must be at least {longest}"
        )


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
    files = {component: f"{component}.tflite" for component in components}
    more = {"format": FORMAT, "recipe": recipe, "target": target}
    manifest = exports.write_manifest(model, config, sizes, files, folder, **more)
    rows = {}
    for component in components:
        row = rows[component] = convert_one(component, model, config, sizes, folder, manifest)
        gc.collect()
        if component != "text" and (recipe == "int8_static" or sensitivity):
            # Known only now: calibration keeps every activation of the graph.
            needed = row["file_bytes"] + audit.preserved_bytes(folder / row["file"])
            resources.check_memory(f"calibrating {component}", needed)
    if recipe != "fp32":
        quantize_all(folder, manifest, rows, recipe, calibration_samples, sensitivity)
    report = {
        "components": rows,
        "model": str(model),
        "recipe": recipe,
        "target": target,
        "sizes": dataclasses.asdict(sizes),
    }
    if "unet" in rows:
        report["attention_scores_bytes"] = attention_bytes(config, sizes)
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
        compared = quantize.compare(path, held_out, parity.FLOORS[quantize.applied(component, recipe)])
        floats.unlink()
        row["quantized"] = {
            "file_bytes": found.file_bytes,
            **run_bytes(path),
            "ops": found.ops,
            "seconds": time.perf_counter() - begin,
            "parity_on": "inputs of the sampler" if complete else "random inputs",
            "parity": dataclasses.asdict(compared),
            **chosen,
        }
        row["faults"] += found.faults
        gc.collect()


def run_bytes(path: Path) -> dict[str, Any]:
    """What running a file on CPU is predicted to take: in all, and its parts."""
    memory = audit.run_memory(path)
    return {"predicted_run_bytes": memory.total, "predicted_run_parts": dataclasses.asdict(memory)}


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
    seconds, peak = time.perf_counter() - begin, resources.peak_memory_bytes()
    found = audit.audit(path)
    load = functools.partial(exports.load, component, model, config)
    converted = functools.partial(load_component, folder, manifest, component, threads=0)
    compared = parity.compare(component, config, sizes, load, converted, parity.FLOORS["fp32"])
    return {
        "file": path.name,
        "file_bytes": found.file_bytes,
        "seconds": seconds,
        "peak_memory_so_far_bytes": peak,  # of the whole command until here, before this component is compared
        **run_bytes(path),
        "ops": found.ops,
        "faults": list(found.faults),
        "parity": dataclasses.asdict(compared),
        **ports,
    }


def attention_bytes(config: ModelConfig, sizes: Sizes) -> dict[str, int]:
    """Bytes of the U-Net's largest attention scores in float32: whole, and with the chunk of this export."""
    unet, (h, w) = config.unet, sizes.latent(config)
    columns = 2 * w if unet.condition_layout == "width" else w
    whole = exported = 0
    last = unet.levels - 1
    kinds = [*enumerate(unet.down_blocks), (last, "self_cross"), *((last - i, k) for i, k in enumerate(unet.up_blocks))]
    for level, kind in kinds:
        tokens, heads = (h >> level) * (columns >> level), unet.num_heads[level]
        groups = unet.num_kv_heads or heads  # of query heads that share keys; the chunk is rows of each
        rows = tokens * heads // groups
        chunk = min(sizes.attention_chunk or rows, rows)
        for keys in {"plain": (), "cross": (sizes.text_length,), "self_cross": (tokens, sizes.text_length)}[kind]:
            whole = max(whole, 4 * sizes.batch * groups * rows * keys)
            exported = max(exported, 4 * sizes.batch * groups * chunk * keys)
    return {"whole": whole, "as_exported": exported}


def table(report: dict[str, Any]) -> str:
    """One line a component."""
    widths = {"component": -12, "MB": 8, "run MB": 8, "ops": 6, "seconds": 8, "max abs": 9, "rel rms": 9}
    lines = [" ".join(f"{name:{'<' if w < 0 else '>'}{abs(w)}}" for name, w in widths.items()) + "  floor"]
    for name, row in report["components"].items():
        shown = {**row, **row.get("quantized", {})}
        lines.append(
            f"{name:<12} {shown['file_bytes'] / 1e6:8.1f} {shown['predicted_run_bytes'] / 1e6:8.1f} "
            f"{sum(shown['ops'].values()):6d} {shown['seconds']:8.1f} "
            f"{shown['parity']['max_abs']:9.1e} {shown['parity']['relative_rms']:9.1e}  "
            f"{'ok' if row_passed(row) else 'MISSED'}"
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
    if "attention_scores_bytes" in report:
        scores = report["attention_scores_bytes"]
        lines.append(
            f"largest attention scores of the U-Net: {scores['as_exported'] / 1e6:.1f} MB as exported, "
            f"{scores['whole'] / 1e6:.1f} MB whole"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
