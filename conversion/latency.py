"""Times the U-Net of converted folders beside each other: python -m conversion.latency --run NAME=DIR --run NAME=DIR …

A DIR is a folder of `to_litert`, of `to_onnx` or of `to_torch` (PyTorch eager, its module as `from_pretrained` gives
it). Every one runs in a process of its own, one after the other, on the CPU with the same number of threads: one call
that does not count, then `--calls` that do. Inputs are random; the median is compared.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dreamlite_jax import cli
from dreamlite_jax.errors import UserError

from .runtime import peak_memory_bytes

MARK = "LATENCY "
Call = Callable[[], Any]


def kind_of(folder: Path) -> str:
    """Which engine a folder is for: "litert", "onnx" or "torch"."""
    files = {"litert": "unet.tflite", "onnx": "unet.onnx", "torch": "unet/config.json"}
    for kind, file in files.items():
        if (folder / file).is_file():
            return kind
    raise UserError(f"{folder} has none of {', '.join(files.values())}; convert the U-Net there first")


def litert_call(folder: Path, threads: int) -> tuple[Call, list[int]]:
    from .audit import random_input, read_metadata
    from .runtime import load_component

    path = folder / "unet.tflite"
    ports = read_metadata(path)["inputs"]
    run = load_component(folder, {"files": {"unet": path.name}}, "unet", threads)
    inputs = {port["name"]: random_input(port, seed) for seed, port in enumerate(ports)}
    return lambda: run(**inputs), list(inputs["sample"].shape)


def onnx_call(folder: Path, threads: int) -> tuple[Call, list[int]]:
    from .audit import random_input
    from .onnx_session import open_session

    session = open_session(folder / "unet.onnx", threads)
    ports = [{"name": i.name, "shape": i.shape, "dtype": "float32"} for i in session.get_inputs()]
    inputs = {port["name"]: random_input(port, seed) for seed, port in enumerate(ports)}
    return lambda: session.run(None, inputs), list(inputs["sample"].shape)


def torch_call(folder: Path, threads: int, sample: Sequence[int], text_length: int) -> tuple[Call, list[int]]:
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

    return call, list(sample)


def measure(folder: str, threads: int, calls: int, sample: Sequence[int], text_length: int) -> None:
    """Body of the separate process: prints one JSON line."""
    path = Path(folder)
    kind = kind_of(path)
    begin = time.perf_counter()
    if kind == "torch":
        call, shape = torch_call(path, threads, sample, text_length)
    else:
        call, shape = {"litert": litert_call, "onnx": onnx_call}[kind](path, threads)
    load = time.perf_counter() - begin
    seconds = []
    for _ in range(calls + 1):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    row = {"kind": kind, "load": load, "first": seconds[0], "seconds": seconds[1:], "sample": shape}
    row |= {"median": statistics.median(seconds[1:]), "peak_memory_bytes": peak_memory_bytes()}
    print(MARK + json.dumps(row), flush=True)


def measure_apart(folder: Path, *args: Any) -> dict[str, Any]:
    """`measure` in a process of its own."""
    code = f"import json, sys; from {__package__} import latency; latency.measure(*json.loads(sys.argv[1]))"
    root = Path(__file__).resolve().parent.parent
    search = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps([str(folder), *args])],
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
    )
    lines = [line.removeprefix(MARK) for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        raise RuntimeError(f"{folder}: the process ended with code {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(lines[-1])


def protocol(args: argparse.Namespace, sample: Sequence[int]) -> str:
    """What was measured, how and on what."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor()
    return (
        f"U-Net, canvas {list(sample)} (NHWC), text length {args.text_length}, {args.threads} threads, CPU "
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
    parser.add_argument("--sample", type=int, nargs=4, default=[1, 64, 128, 4], help="canvas of PyTorch: b h 2w c")
    parser.add_argument("--text_length", type=int, default=128, help="of PyTorch; converted files have their own")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_args(sys.argv[1:] if argv is None else argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.threads < 1 or args.calls < 1:
        raise UserError(f"--threads is {args.threads} and --calls is {args.calls}; both must be at least 1")
    runs = dict(entry.partition("=")[::2] for entry in args.run)
    for name, folder in runs.items():
        if not folder:
            raise UserError(f"--run {name} must be NAME=DIR")
        kind_of(Path(folder))
    head = protocol(args, args.sample)
    print(head, flush=True)
    rows: dict[str, Any] = {}
    for name, folder in runs.items():
        row = measure_apart(Path(folder), args.threads, args.calls, args.sample, args.text_length)
        if row["sample"] != args.sample:
            raise UserError(f"--run {name}: its canvas is {row['sample']}; the others' is {args.sample}")
        rows[name] = row
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
        args.output.write_text(json.dumps({"protocol": head, "runs": rows}, indent=2) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    cli.run(main)
