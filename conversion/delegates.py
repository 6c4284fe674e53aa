"""Which hardware takes a converted file whole: python -m conversion.delegates --model LITERT_DIR [--no_run].

The GPU answer comes from LiteRT's own GPU accelerator where one can start (a software Vulkan driver will do), in a
process of its own, and its numbers are compared with the CPU's: it is known to compute some graphs silently wrong.
Where it cannot start, a table of rules answers; the tests hold the table to the accelerator. The NPU answer comes from
Qualcomm's compiler where its libraries are installed (`npu`), else from the rules too.
"""

import ctypes
import dataclasses
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dreamlite_jax import cli
from dreamlite_jax.errors import UserError

from . import apart, extras, npu
from .audit import Operation, Tensor, audit, operations, random_input, read_metadata

# Of the output's range. Under int8 recipes the CPU rounds activations to 8 bits and the GPU computes in float.
GPU_TOLERANCE = {"fp32": 1e-3, "fp16": 1e-3, "int4_weights": 1e-3, "int8_dynamic": 5e-2, "int8_static": 5e-2}
SOFTWARE_DRIVERS = ("/usr/lib/chromium/vk_swiftshader_icd.json", "/usr/share/vulkan/icd.d/lvp_icd.x86_64.json")

# What LiteRT's GPU accelerator (WebGPU build of ai-edge-litert 2.3.0) and Qualcomm's HTP compiler take, among the
# operations that our graphs or likely mistakes contain.
_BOTH = """
    ABS ADD BATCH_MATMUL CONCATENATION CONV_2D DEPTHWISE_CONV_2D DEQUANTIZE DIV EMBEDDING_LOOKUP FULLY_CONNECTED
    GELU LOGISTIC MAXIMUM MEAN MUL PAD QUANTIZE REDUCE_MAX RESHAPE RESIZE_NEAREST_NEIGHBOR RSQRT SLICE SOFTMAX SUB
    TANH TRANSPOSE
"""
TAKEN = {"gpu": frozenset(_BOTH.split()), "npu": frozenset(_BOTH.split()) | {"GATHER", "GATHER_ND"}}
ELEMENTWISE = ("ADD", "SUB", "MUL")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a delegate runs a whole file.

    Attributes:
      how: "accelerator" or "compiler" when it was tried, "rules" when the table says so.
      refused: sentences that name the operation and the layer that made it.
      difference: largest difference from CPU over the output's range, where it was run.
    """

    delegate: str
    whole: bool
    how: str
    refused: tuple[str, ...] = ()
    difference: float | None = None


def by_rules(path: str | Path, delegate: str) -> Verdict:
    """What the table says of a file. `delegate` is "gpu", "npu" or "cpu" (which takes every builtin operation)."""
    if delegate == "cpu":
        faults = tuple(fault for fault in audit(path).faults if "no builtin" in fault)
        return Verdict("cpu", not faults, "rules", faults)
    if delegate not in TAKEN:
        raise UserError(f"delegate is {delegate!r}; it must be one of cpu, {', '.join(TAKEN)}")
    refused = dict.fromkeys(sentence for op in operations(path) for sentence in refusals(op, delegate))
    return Verdict(delegate, not refused, "rules", tuple(refused))


def refusals(op: Operation, delegate: str) -> list[str]:
    """Why a delegate would not run this operation, or not rightly; empty when it would."""
    where = f"in {op.layer}"
    found = []
    if op.kind not in TAKEN[delegate]:
        found.append(f"{op.kind} is not taken, {where}")
    if any(len(tensor.shape) > 4 for tensor in (*op.inputs, *op.outputs)):
        found.append(f"{op.kind} has more than four dimensions, {where}")
    if op.kind == "BATCH_MATMUL" and not equal_batch(*op.inputs[:2]):
        found.append(f"BATCH_MATMUL broadcasts a batch axis, which GPUs compute silently wrong, {where}")
    if op.kind in ELEMENTWISE and len(op.inputs) > 1 and not table_added_right(*op.inputs[:2]):
        found.append(f"{op.kind} has a constant that GPUs read along other axes, {where}")
    return found


def equal_batch(a: Tensor, b: Tensor) -> bool:
    """Whether a batched product has the same leading axes on both sides."""
    return a.shape[:-2] == b.shape[:-2]


def table_added_right(a: Tensor, b: Tensor) -> bool:
    """Whether a constant with rows, like a table of positions, meets its partner along the same axes on a GPU.

    Of a constant (s, d) it reads the first row for all; beside one of (1, s, d) it takes (s, d) for a batch of s.
    """
    for constant, other in ((a, b), (b, a)):
        if constant.constant and any(size > 1 for size in constant.shape[:-1]):
            return len(constant.shape) == len(other.shape) > 2
    return True


# --- the real accelerator


def gpu_environment() -> dict[str, str] | None:
    """Environment in which the GPU accelerator can start, or None when there is no Vulkan loader or no driver."""
    try:
        ctypes.CDLL("libvulkan.so.1")
    except OSError:
        return None
    environment = {"XDG_RUNTIME_DIR": os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()}
    if os.environ.get("VK_ICD_FILENAMES") or os.environ.get("VK_DRIVER_FILES") or Path("/dev/dri").exists():
        return environment
    drivers = [path for path in SOFTWARE_DRIVERS if Path(path).is_file()]
    return {**environment, "VK_ICD_FILENAMES": drivers[0]} if drivers else None


def on_gpu(path: str | Path, *, run: bool = True, timeout_sec: float = 1800) -> Verdict:
    """Asks the real accelerator: is every operation taken, and are the numbers those of the CPU?

    Args:
      run: whether to compute too; on a software driver a large network takes minutes.

    Raises:
      UserError: no accelerator can start here.
    """
    environment = gpu_environment()
    if environment is None:
        raise UserError(
            "no Vulkan driver was found, so the GPU accelerator cannot start; install libvulkan1 and a driver "
            "(Debian's chromium brings a software one), or set VK_ICD_FILENAMES"
        )
    try:
        done = apart.call("delegates", "probe", str(path), run, environment=environment, timeout_sec=timeout_sec)
    except subprocess.TimeoutExpired:
        return Verdict("gpu", False, "accelerator", (f"no answer within {timeout_sec:g} seconds",))
    refused = _refused_operations(done.log, path)
    whole = bool(done.answer.get("whole")) and done.code == 0 and not refused
    difference = done.answer.get("difference")
    if not whole and not refused:
        refused = [f"the accelerator ended with code {done.code}: {_last_error(done.log)}"]
    if difference is not None and not difference <= GPU_TOLERANCE[read_metadata(path)["recipe"]]:
        whole = False
        refused.append(f"its numbers differ from the CPU's by {difference:.2g} of the output's range")
    return Verdict("gpu", whole, "accelerator", tuple(refused), difference)


def _refused_operations(log: str, path: str | Path) -> list[str]:
    """'Following operations are not supported by GPU delegate:' and its list, with the layers of these operations."""
    lines, kinds = log.splitlines(), {}
    for i, line in enumerate(lines):
        if "operations are not supported" in line:
            for entry in lines[i + 1 :]:
                kind, found, why = entry.strip().partition(": ")
                if not found or not kind.replace("_", "").isalnum() or not kind.isupper():
                    break
                kinds[kind] = why
    return list(
        dict.fromkeys(
            f"{op.kind} is not taken ({kinds[op.kind]}), in {op.layer}" for op in operations(path) if op.kind in kinds
        )
    )


def _last_error(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if "plugin" not in line and "openvino" not in line.lower()]
    causes = [line.removeprefix("└ ") for line in lines if line.startswith("└ ") and "ERROR" not in line]
    errors = [line for line in lines if "ERROR" in line or "Error" in line or "Check failed" in line]
    return (causes or errors or ["no message"])[-1]


def probe(path: str, run: bool) -> None:
    """Body of the separate process: compiles for the GPU, runs beside the CPU."""
    from ai_edge_litert.compiled_model import CompiledModel
    from ai_edge_litert.hardware_accelerator import HardwareAccelerator

    metadata = read_metadata(path)
    inputs = {port["name"]: random_input(port, seed) for seed, port in enumerate(metadata["inputs"])}
    gpu = CompiledModel.from_file(path, hardware_accel=HardwareAccelerator.GPU)
    found: dict[str, Any] = {"whole": bool(gpu.is_fully_accelerated())}
    apart.answer(found)
    if run:
        cpu = CompiledModel.from_file(path, hardware_accel=HardwareAccelerator.CPU)
        shape = metadata["outputs"][0]["shape"]
        wanted, ours = (_run(model, inputs, shape) for model in (cpu, gpu))
        found["difference"] = float(np.abs(wanted - ours).max() / max(float(np.ptp(wanted)), 1e-12))
        apart.answer(found)


def _run(model: Any, inputs: dict[str, np.ndarray], shape: Sequence[int]) -> np.ndarray:
    names = model.get_signature_by_index(0)["inputs"]
    buffers, outputs = model.create_input_buffers(0), model.create_output_buffers(0)
    for buffer, name in zip(buffers, names, strict=True):
        buffer.write(inputs[name])
    model.run_by_index(0, buffers, outputs)
    return outputs[0].read(int(np.prod(shape)), np.float32)


# --- one table


def verdicts(path: str | Path, *, accelerators: bool = True, run: bool = True, soc: str = "") -> list[Verdict]:
    """Of CPU, GPU and NPU, the latter two by the accelerator and the compiler where those can start.

    Args:
      accelerators: whether to try them at all; the rules take no time.
      run: whether the GPU computes too.
      soc: name of the system on chip to compile for; default `npu.DEFAULT_SOC`.
    """
    gpu = accelerators and gpu_environment() is not None
    compiler = accelerators and npu.sdk_folder() is not None
    return [
        by_rules(path, "cpu"),
        on_gpu(path, run=run) if gpu else by_rules(path, "gpu"),
        on_npu(path, soc or npu.DEFAULT_SOC) if compiler else by_rules(path, "npu"),
    ]


def on_npu(path: str | Path, soc: str = npu.DEFAULT_SOC) -> Verdict:
    """Compiles for an NPU: every operation in one partition, or which would stay outside by the rules."""
    try:
        taken, count, partitions = npu.partition(path, soc)
    except RuntimeError as error:
        return Verdict("npu", False, "compiler", (str(error),))
    if taken == count and partitions == 1:
        return Verdict("npu", True, "compiler")
    refused = (f"{soc} takes {taken} of {count} operations, in {partitions} partitions",)
    return Verdict("npu", False, "compiler", (*refused, *by_rules(path, "npu").refused))


def table(found: dict[str, list[Verdict]]) -> str:
    """'runs whole on: …' for each component, with what would fall back below it."""
    lines = []
    for component, answers in found.items():
        whole = [f"{v.delegate} ({v.how})" for v in answers if v.whole]
        lines.append(f"{component:<12} runs whole on: {', '.join(whole) or 'nothing'}")
        for verdict in answers:
            if verdict.difference is not None:
                lines.append(
                    f"  {verdict.delegate}: within {verdict.difference:.1e} of the output's range from the CPU"
                )
            lines += [f"  {verdict.delegate}: {sentence}" for sentence in verdict.refused[:8]]
            if len(verdict.refused) > 8:
                lines.append(f"  {verdict.delegate}: and {len(verdict.refused) - 8} more")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; the exit code is 1 when the target of the conversion does not run a file whole."""
    parser = cli.documented("conversion.delegates", __doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder written by conversion.to_litert")
    parser.add_argument("--no_run", action="store_true", help="ask the GPU accelerator what it takes, compute nothing")
    parser.add_argument("--rules", action="store_true", help="the table of rules alone, which takes no time")
    parser.add_argument("--npu_soc", default=npu.DEFAULT_SOC, help="system on chip to compile for")
    args = parser.parse_args(argv)
    from .runtime import read_manifest

    extras.check("delegates", extras.LITERT)
    npu.check_soc(args.npu_soc)
    manifest = read_manifest(args.model)
    found = {
        component: verdicts(args.model / file, accelerators=not args.rules, run=not args.no_run, soc=args.npu_soc)
        for component, file in manifest["files"].items()
    }
    print(table(found))
    target = manifest["target"]
    failed = [c for c, answers in found.items() if not all(v.whole for v in answers if v.delegate == target)]
    if failed:
        print(f"NOT WHOLE on the target {target}: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    cli.run(main)
