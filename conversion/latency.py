"""Times the U-Net of converted folders beside each other: python -m conversion.latency --run NAME=DIR --run NAME=DIR …

A DIR is a folder of `to_litert`, of `to_onnx` or of `to_torch` (PyTorch eager, its module as `from_pretrained` gives
it). Every one runs in a process of its own, one after the other, on the CPU with the same number of threads: one call
that does not count, then `--calls` that do. Inputs are random; the median is compared. Canvas and text length are those
that the files were converted for; PyTorch alone needs --sample and --text_length.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dreamlite_jax import cli
from dreamlite_jax.errors import UserError
from dreamlite_jax.json_files import read_json, write_json

from . import apart, extras, outputs
from .resources import bounded_threads, peak_memory_bytes

Call = Callable[[], Any]
ENGINES = {  # the file that tells a folder's engine, and the modules that the engine is
    "litert": ("unet.tflite", extras.LITERT),
    "onnx": ("unet.onnx", extras.ONNX),
    "torch": ("unet/config.json", ("torch", "diffusers")),
}


def kind_of(folder: Path) -> str:
    """Which engine a folder is for: "litert", "onnx" or "torch"."""
    for kind, (file, _) in ENGINES.items():
        if (folder / file).is_file():
            return kind
    files = ", ".join(file for file, _ in ENGINES.values())
    raise UserError(f"{folder} has none of {files}; convert the U-Net there first")


def ports_of(folder: Path) -> list[dict[str, Any]]:
    """The inputs of a converted U-Net, as its report has them."""
    return read_json(folder / "report.json")["components"]["unet"]["inputs"]


def shapes_of(folder: Path) -> tuple[list[int], int]:
    """(canvas, text length) that a converted U-Net was made for."""
    shapes = {port["name"]: port["shape"] for port in ports_of(folder)}
    return shapes["sample"], shapes["text"][1]


def converted_call(folder: Path, threads: int, kind: str) -> Call:
    from .audit import random_input

    inputs = {port["name"]: random_input(port, seed) for seed, port in enumerate(ports_of(folder))}
    if kind == "litert":
        from .runtime import load_component

        run = load_component(folder, {"files": {"unet": "unet.tflite"}}, "unet", threads)
        return lambda: run(**inputs)
    from .onnx_session import open_session

    session = open_session(folder / "unet.onnx", threads)
    return lambda: session.run(None, inputs)


def torch_call(folder: Path, threads: int, sample: Sequence[int], text_length: int) -> Call:
    import torch
    from diffusers import DreamLiteUNetModel

    torch.set_num_threads(threads)
    model = DreamLiteUNetModel.from_pretrained(folder / "unet").eval()
    b, h, columns, c = sample
    text = torch.randn(b, text_length, model.config.encoder_hid_dim)
    inputs = {
        "encoder_hidden_states": text,
        "encoder_attention_mask": torch.ones(b, text_length),
        "added_cond_kwargs": {"time_ids": torch.tensor([[4.0 * columns, 8.0 * h]] * b)},
    }
    canvas, timestep = torch.randn(b, c, h, columns), torch.full((b,), 500.0)

    def call() -> Any:
        with torch.inference_mode():
            return model(canvas, timestep, **inputs)

    return call


def measure(folder: str, threads: int, calls: int, sample: Sequence[int], text_length: int) -> None:
    """Body of the separate process."""
    path = Path(folder)
    kind = kind_of(path)
    begin = time.perf_counter()
    if kind == "torch":
        call = torch_call(path, threads, sample, text_length)
    else:
        call = converted_call(path, threads, kind)
    load = time.perf_counter() - begin
    seconds = []
    for _ in range(calls + 1):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    row = {"kind": kind, "load": load, "first": seconds[0], "seconds": seconds[1:]}
    apart.answer({**row, "median": statistics.median(seconds[1:]), "peak_memory_bytes": peak_memory_bytes()})


def measure_apart(folder: Path, *args: Any) -> dict[str, Any]:
    """`measure` in a process of its own."""
    done = apart.call("latency", "measure", str(folder), *args)
    if done.code or not done.answer:
        raise RuntimeError(f"{folder}: the process ended with code {done.code}: {done.log[-2000:]}")
    return done.answer


def chosen_runs(entries: Sequence[str]) -> dict[str, Path]:
    """Folders by name; `UserError` for an entry that is not NAME=DIR with a name of its own and a U-Net in DIR."""
    runs: dict[str, Path] = {}
    for entry in entries:
        name, _, folder = entry.partition("=")
        if not name or not folder:
            raise UserError(f"--run {entry} must be NAME=DIR")
        if name in runs:
            raise UserError(f"--run {entry}: the name {name} is taken by {runs[name]}; each needs its own")
        kind_of(Path(folder))
        runs[name] = Path(folder)
    return runs


def chosen_shapes(args: argparse.Namespace, runs: dict[str, Path]) -> tuple[list[int], int]:
    """(canvas, text length) of all runs: what was asked for and every converted file must agree."""
    of_files = {f"--run {name}": shapes_of(f) for name, f in runs.items() if kind_of(f) != "torch"}
    known: list[tuple[str, list[int] | None, int | None]] = [("the command line", args.sample, args.text_length)]
    known += [(name, *shapes) for name, shapes in of_files.items()]
    chosen = []
    for what, at in (("canvas", 1), ("text length", 2)):
        values = [(entry[0], entry[at]) for entry in known if entry[at] is not None]
        if not values:
            raise UserError("of PyTorch alone give --sample and --text_length; else they are those of a converted file")
        for name, value in values:
            if value != values[0][1]:
                raise UserError(f"{name}: its {what} is {value}; that of {values[0][0]} is {values[0][1]}")
        chosen.append(values[0][1])
    return chosen[0], chosen[1]


def protocol(args: argparse.Namespace, sample: Sequence[int], text_length: int) -> str:
    """What was measured, how and on what."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor()
    return (
        f"U-Net, canvas {list(sample)} (NHWC), text length {text_length}, {args.threads} threads, CPU "
        f"{processor} x{os.cpu_count()}, one call to warm up, median of {args.calls}, "
        f"a process each, one after the other; load average before: {os.getloadavg()[0]:.1f}"
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.documented("conversion.latency", __doc__)
    parser.add_argument(
        "--run", action="append", required=True, metavar="NAME=DIR", help="again for each; the order counts"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--sample", type=int, nargs=4, help="canvas, b h 2w c; default: that of the files")
    parser.add_argument("--text_length", type=int, help="tokens; default: likewise")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_args(sys.argv[1:] if argv is None else argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.threads < 1 or args.calls < 1:
        raise UserError(f"--threads is {args.threads} and --calls is {args.calls}; both must be at least 1")
    runs = chosen_runs(args.run)
    sample, text_length = chosen_shapes(args, runs)
    for kind in {kind_of(folder) for folder in runs.values()}:
        extras.check(f"latency of a {kind} folder", ENGINES[kind][1], "test" if kind == "torch" else "convert")
    args.threads = bounded_threads(args.threads)
    outputs.check_file(args.output)
    head = protocol(args, sample, text_length)
    print(head, flush=True)
    rows: dict[str, Any] = {}
    for name, folder in runs.items():
        row = rows[name] = measure_apart(folder, args.threads, args.calls, sample, text_length)
        spread = f"{min(row['seconds']):.2f}..{max(row['seconds']):.2f}"
        print(
            f"{name:<16} {row['kind']:<7} median {row['median']:7.3f} s ({spread})   first {row['first']:6.2f} s   "
            f"load {row['load']:6.2f} s   peak {row['peak_memory_bytes'] / 1e9:.2f} GB",
            flush=True,
        )
    for name, row in rows.items():
        eager = next((other for other in rows.values() if other["kind"] == "torch"), None)
        if eager and row is not eager:
            print(f"{name}: {row['median'] / eager['median']:.2f} of PyTorch's time")
    if args.output:
        write_json(args.output, {"protocol": head, "runs": rows})
    return 0


if __name__ == "__main__":
    cli.run(main)
