"""What Qualcomm's compiler takes of a converted file: ahead-of-time compilation for a Snapdragon, without the device.

Needs the package `ai-edge-litert-sdk-qualcomm` with the SDK's libraries in it; README.md here says how to get both.
Only the partition is looked at: nothing is executed, so no number is compared.
"""

import importlib.util
import tempfile
from pathlib import Path

from dreamlite_jax.errors import UserError

SDK = "ai_edge_litert_sdk_qualcomm"
LIBRARIES = Path("data", "lib", "x86_64-linux-clang")
DEFAULT_SOC = "SM8750"  # Snapdragon 8 Elite


def sdk_folder() -> Path | None:
    """The folder of the SDK's libraries, or None where they are not installed."""
    spec = importlib.util.find_spec(SDK)
    if spec is None or spec.origin is None or importlib.util.find_spec("ai_edge_litert") is None:
        return None
    folder = Path(spec.origin).parent / LIBRARIES
    return folder if (folder / "libQnnHtp.so").is_file() else None


def check_soc(soc: str) -> None:
    """Raises `UserError` for a system on chip that LiteRT has no name for, whether or not the SDK is installed."""
    from ai_edge_litert.aot.vendors.qualcomm import target

    if soc not in target.SocModel.__members__:
        raise UserError(f"the NPU {soc!r} is unknown; it must be one of {', '.join(target.SocModel.__members__)}")


def partition(path: str | Path, soc: str = DEFAULT_SOC) -> tuple[int, int, int]:
    """(operations in NPU partitions, operations in all, partitions) of a compiled file.

    Raises:
      UserError: no SDK, or a system on chip that it does not know.
      RuntimeError: the compiler failed.
    """
    if sdk_folder() is None:
        raise UserError(f"the libraries of {SDK} are not installed, so nothing can be compiled for an NPU; see README")
    from ai_edge_litert.aot import aot_compile
    from ai_edge_litert.aot.vendors.qualcomm import target

    check_soc(soc)
    with tempfile.TemporaryDirectory() as folder:
        result = aot_compile.aot_compile(
            str(path), output_dir=folder, target=[target.Target(target.SocModel[soc])], keep_going=True
        )
        if result.failed_backends:
            raise RuntimeError(f"{path}: the compiler of {soc} failed: {result.failed_backends[0][1]}")
        # The result lists the model it was given too, which has no partition.
        (stats,) = [m.partition_stats.subgraph_stats for _, m in result.models_with_backend if m.partition_stats]
    taken = sum(row.num_ops_offloaded for row in stats)
    return taken, sum(row.num_total_ops for row in stats), sum(row.num_partitions_offloaded for row in stats)
