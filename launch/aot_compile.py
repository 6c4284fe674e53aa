"""Compiles the real step of a config for a TPU topology on a machine without a TPU, and says what it would take there.

    python launch/aot_compile.py --config configs/dreamlite.py:t2i_256 --topology v5e:4x4 [--slices 2] [--largest_batch]

Needs the package libtpu (extras [tpu] and [test]); no TPU, data, models to start from or reward models. Topologies:
v5e:2x2, 4x4, 8x8, 16x16, those of v6e, v5p:2x2x4, 4x4x4, 4x8x8; --slices joins several by the data centre's network.
`--config.FIELD=VALUE` overrides as in training. Prints memory a chip and the collectives of the compiled program. Both
are the TPU compiler's own; times and FLOPs are not to be had here. A full-size step takes 3 to 8 minutes of two idle
cores, and 6 GB.

Exit codes: 0 it fits; 1 it does not, or it moves activations between chips (all-to-all); 2 bad arguments.
"""

import argparse
import dataclasses
import importlib.util
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from dreamlite_jax import cli
from dreamlite_jax.config import to_dict
from dreamlite_jax.errors import UserError
from dreamlite_jax.json_files import write_json
from dreamlite_jax.training.config import TrainConfig, load_config
from dreamlite_jax.training.stages import table

OVERRIDE = "--config."
GIB = 2**30
COMPILER_OPTIONS = {
    "exec_time_optimization_effort": -1.0,  # much less compile time; memory and collectives stay
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000,
}
ENVIRONMENT = {  # read when JAX and libtpu load
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
# GiB of HBM that the compiler gives a program, by JAX's `device_kind`.
HBM_GIB = {"TPU v4": 30.75, "TPU v5 lite": 15.75, "TPU v5": 94.75, "TPU v6 lite": 31.25}
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16)\[([\d,]*)\]")
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
OPERATION = re.compile(rf"^\s*(?:ROOT )?%?[\w.-]+ = (.*?) ((?:{'|'.join(KINDS)})(?:-start)?)\(")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one chip, as the compiler lays the program out: with arrays padded to its tiles.

    `peak` is the most that is there at one moment, arguments included and `code` apart. The others say what it is made
    of; outputs that reuse the memory of donated arguments count once. Their sum is another number than the peak, above
    or below it, because what the compiler calls temporaries is not all alive at once and not all that it needs.
    """

    peak: int
    arguments: int
    outputs: int
    temporaries: int
    code: int

    @property
    def needed(self) -> int:
        return self.peak + self.code


@dataclasses.dataclass(frozen=True)
class Report:
    """What one compile says; `available` and `needed` are bytes of one chip.

    Without `memory` the compiler refused the program, and `refused` is its own line about it.
    """

    batch_size: int
    sec: float
    available: float
    memory: Memory | None
    collectives: dict[str, tuple[int, int]]
    refused: str = ""

    @property
    def fits(self) -> bool:
        return self.memory is not None and self.memory.needed <= self.available

    @property
    def needed(self) -> float:
        """0 where the compiler does not say."""
        if self.memory:
            return self.memory.needed
        found = re.search(r"Used ([\d.]+)([KMGT]) of", self.refused)
        return float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1) if found else 0.0

    def __str__(self) -> str:
        if not self.memory:
            return self.refused
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in dataclasses.asdict(self.memory).items())
        return f"{self.needed / GIB:.2f} of {self.available / GIB:.2f} GiB a chip ({parts})"


def collectives(program: str) -> dict[str, tuple[int, int]]:
    """Number and result bytes on one chip of each kind of collective in a compiled program's text.

    A reduction of which a chip keeps a part is a reduce-scatter: TPU compilers write it as a fusion whose name has
    all-reduce-scatter. One that is started and awaited apart, or stands in an async fusion, runs beside other work:
    it counts once more, as "… (async)".
    """
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    scattering, overlapping = callees(program, "all-reduce-scatter"), callees(program, "async.collective")
    computation = ""
    for line in program.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            computation = line.split()[line.startswith("ENTRY")].lstrip("%")
        if not (found := OPERATION.match(line)):
            continue
        kind = found[2].removesuffix("-start")
        if kind == "all-reduce" and computation in scattering:
            kind = "reduce-scatter"
        apart = found[2].endswith("-start") or computation in overlapping
        for name in (kind, f"{kind} (async)") if apart else (kind,):
            counts[name] += 1
            sizes[name] += array_bytes(found[1])
    return {kind: (count, sizes[kind]) for kind, count in sorted(counts.items())}


def callees(program: str, name: str) -> set[str]:
    """Computations that have this in their name, or are called by an operation that has."""
    called = re.findall(rf"^\s*(?:ROOT )?%?[\w.-]*{name}[\w.-]* = .*calls=%?([\w.-]+)", program, re.M)
    return {*called, *re.findall(rf"^%?([\w.-]*{name}[\w.-]*) \(", program, re.M)}


def array_bytes(shape: str) -> int:
    """Bytes of all arrays named in an HLO shape, such as (f32[8,4]{1,0}, bf16[3])."""
    total = 0
    for kind, sizes in ARRAY.findall(shape):
        items = 1
        for size in filter(None, sizes.split(",")):
            items *= int(size)
        total += items * BYTES.get(kind, 4)
    return total


def compile_step(config: TrainConfig, devices: list, size: tuple[int, int], dump: Path | None) -> Report:
    """Compiles the step of a config for these chips. Nothing runs, and no array of the model's size is made.

    Args:
      size: (width, height) of the pictures in pixels; zeros mean the config's own.
      dump: where to write the compiled program's text.
    """
    import jax

    from dreamlite_jax.parallel import sharding
    from dreamlite_jax.training.build import build
    from dreamlite_jax.training.loop import check_batch

    mesh = sharding.make_mesh(config.mesh, devices)
    check_batch(config, mesh.size)
    stage, feed, _ = build(config, shapes_only=True)
    shapes, rows = stage.state_shapes(), feed.batch(stage.fields, *size)
    with jax.set_mesh(mesh):  # nothing may be computed in here: there are no such devices
        placement = sharding.state_sharding(mesh, shapes)
        state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placement)
        put = sharding.batch_sharding(mesh)
        batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=put) for name, x in rows.items()}
        # As the loop compiles it.
        jitted = jax.jit(stage.step, donate_argnums=0, out_shardings=(placement, sharding.replicated(mesh)))
        lowered = jitted.lower(state, batch)
        started = time.monotonic()
        available = HBM_GIB[devices[0].device_kind] * GIB
        try:
            compiled = lowered.compile(compiler_options=COMPILER_OPTIONS)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return Report(config.data.batch_size, time.monotonic() - started, available, None, {}, refusal(str(error)))
    sec = time.monotonic() - started
    program = compiled.as_text()
    if dump:
        dump.parent.mkdir(parents=True, exist_ok=True)
        dump.write_text(program)
    found = compiled.memory_analysis()
    memory = Memory(
        peak=found.peak_memory_in_bytes,
        arguments=found.argument_size_in_bytes,
        outputs=found.output_size_in_bytes - found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        code=found.generated_code_size_in_bytes,
    )
    return Report(config.data.batch_size, sec, available, memory, collectives(program))


def topology_devices(topology: str, slices: int) -> list:
    """Descriptions of the chips of `slices` topologies such as v5e:4x4.

    Raises:
      UserError: no libtpu here, or a topology that it does not know.
    """
    import jax
    from jax.experimental import topologies

    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for a TPU needs libtpu: pip install -c constraints.txt libtpu")
    options = {"num_slices": slices} if slices > 1 else {}
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology {topology} is not known: {str(error).splitlines()[0]}; such as v5e:4x4") from error
    if devices[0].device_kind not in HBM_GIB:
        raise UserError(f"--topology {topology}: how much memory a {devices[0].device_kind} has is not known here")
    return devices


def refusal(message: str) -> str:
    """The line of the compiler's complaint that says how much would be needed."""
    found = re.search(r"Used [\d.]+\w of [\d.]+\w hbm[^\n]*", message)
    return found[0].strip() if found else message.splitlines()[0][:300]


def largest_batch(compile_rows: Callable[[int], Report], first: int) -> dict[int, Report]:
    """Compiles with more and fewer rows a chip until the most that fit are known; all reports, by rows.

    Memory is nearly a line in the rows: two compiles foretell the answer, the next ones check it.
    """
    reports: dict[int, Report] = {}
    good, bad, rows = 0, None, first
    while bad is None or bad - good > 1:
        reports[rows] = compile_rows(rows)
        good, bad = (rows, bad) if reports[rows].fits else (good, rows)
        rows = foretold(reports) or (2 * rows if bad is None else (good + bad) // 2)
        rows = max(good + 1, rows if bad is None else min(rows, bad - 1))
    return reports


def foretold(reports: dict[int, Report]) -> int:
    """Rows at which a line through the two needs nearest to the limit reaches it; 0 without two."""
    points = [(rows, report.needed, report.available) for rows, report in reports.items() if report.needed]
    points = sorted(points, key=lambda point: abs(point[1] - point[2]))[:2]
    if len(points) < 2 or points[0][1] == points[1][1]:
        return 0
    (rows, needed, available), (other, other_needed, _) = points
    return int(rows + (available - needed) * (other - rows) / (other_needed - needed))


def describe(config: TrainConfig, args: argparse.Namespace, report: Report) -> list[str]:
    """The lines that the command prints of a report."""
    chips = config.mesh.fsdp * config.mesh.data
    rows = config.data.batch_size // chips // config.accumulate
    lines = [
        f"{args.config} on {args.slices} x {args.topology}: {chips} chips, data {config.mesh.data} x fsdp "
        f"{config.mesh.fsdp}, batch {config.data.batch_size} = {chips} chips x {config.accumulate} parts x {rows}",
        f"compiled in {report.sec:.0f} s",
        f"memory: {report}",
    ]
    if report.memory:
        sums = ", ".join(f"{n} {kind} {size / GIB:.3f} GiB" for kind, (n, size) in report.collectives.items())
        lines.append(f"collectives: {sums or 'none'}")
    if stray := report.collectives.get("all-to-all"):
        lines.append(f"{stray[0]} all-to-all: activations move between chips, so a sharding is not pinned")
    ways = "mesh.fsdp or the number of chips" + (
        " or config.accumulate" if table.find(config.stage).accumulates else ""
    )
    lines.append("it fits" if report.fits else f"it does not fit: raise {ways}, or set remat")
    return lines


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, TrainConfig]:
    """Arguments and the config with its overrides."""
    parser = cli.Parser(prog="launch/aot_compile.py", description=__doc__.partition("\n")[0])
    cli.add_config(parser, required=True)
    parser.add_argument("--topology", required=True, metavar="v5e:4x4", help="kind of chip and shape of one slice")
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--width", type=int, default=0, help="of the pictures in pixels (default: the config's square)")
    parser.add_argument("--height", type=int, default=0)
    parser.add_argument("--largest_batch", action="store_true", help="several compiles; the config's batch is ignored")
    parser.add_argument("--program", type=Path, help="where to write the compiled program's text (HLO)")
    parser.add_argument("--report", type=Path, help="where to write what was found as JSON")
    overrides = [a.removeprefix(OVERRIDE) for a in argv if a.startswith(OVERRIDE)]
    args = parser.parse_args([a for a in argv if not a.startswith(OVERRIDE)])
    if args.slices < 1:
        raise UserError(f"--slices is {args.slices}; it must be at least 1")
    for name in ("program", "report"):
        if path := getattr(args, name):
            cli.check_file(f"--{name}", path)
    return args, load_config(args.config, overrides)


def main(argv: Sequence[str] | None = None) -> int:
    os.environ.update(ENVIRONMENT)  # first: a stage of one's own loads JAX when the config is read
    args, config = parse(sys.argv[1:] if argv is None else argv)
    devices = topology_devices(args.topology, args.slices)
    mesh = dataclasses.replace(config.mesh, data=config.mesh.data or max(1, len(devices) // config.mesh.fsdp))
    config = dataclasses.replace(config, mesh=mesh)

    def compile_batch(batch_size: int) -> Report:
        data = dataclasses.replace(config.data, batch_size=batch_size)
        asked = dataclasses.replace(config, data=data)
        report = compile_step(asked, devices, (args.width, args.height), args.program)
        print("\n".join(describe(asked, args, report)), flush=True)
        return report

    if args.largest_batch:
        unit = len(devices) * config.accumulate
        first = max(1, config.data.batch_size // unit)
        reports = largest_batch(lambda rows: compile_batch(rows * unit), first)
        most = max((rows for rows, report in reports.items() if report.fits), default=0)
        print(f"largest batch that fits: {most * unit} = {unit} x {most}" if most else "no batch fits")
        report = reports[most or min(reports)]
    else:
        report = compile_batch(config.data.batch_size)
    if args.report:
        found = {**vars(args), **dataclasses.asdict(report), "needed": report.needed, "config": to_dict(config)}
        write_json(args.report, found)
    return 0 if report.fits and "all-to-all" not in report.collectives else 1


if __name__ == "__main__":
    cli.run(main)
