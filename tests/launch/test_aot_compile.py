"""What the compile report reads out of programs and compilers; and one real compile for a TPU, without a TPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dreamlite_jax.errors import UserError

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "aot_compile.py"
spec = importlib.util.spec_from_file_location("aot_compile", SCRIPT)
aot_compile = importlib.util.module_from_spec(spec)
sys.modules["aot_compile"] = aot_compile  # dataclasses look their module up
spec.loader.exec_module(aot_compile)
GIB = aot_compile.GIB

PROGRAM = """HloModule jit_step
%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}
%all-reduce-scatter.3.clone (p: f32[64,32]) -> f32[8,32] {
  %all-reduce.1 = f32[64,32]{1,0:T(8,128)} all-reduce(%p), replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %slice = f32[8,32]{1,0} dynamic-slice(%all-reduce.1, %id), dynamic_slice_sizes={8,32}
}
%fused_computation.7 (p: bf16[4]) -> bf16[32] {
  ROOT %all-gather.2 = bf16[32]{0} all-gather(%p), dimensions={0}
}
ENTRY %main (a: f32[64,32]) -> f32[] {
  %fusion.1 = f32[8,32]{1,0} fusion(%a), kind=kOutput, calls=%all-reduce-scatter.3.clone
  %async-collective-start.1 = (bf16[4], bf16[32]) fusion(%b), kind=kCustom, calls=%fused_computation.7
  %all-reduce-start.5 = (f32[10]{0}, f32[6]{0}) all-reduce-start(%c, %d), to_apply=%add
  %all-reduce-done.5 = (f32[10]{0}, f32[6]{0}) all-reduce-done(%all-reduce-start.5)
  %get = f32[10]{0} get-tuple-element(%all-reduce-done.5), index=0
  ROOT %all-reduce.9 = f32[] all-reduce(%loss), to_apply=%add
}
"""


def test_collectives_are_counted_by_kind_with_their_bytes():
    assert aot_compile.collectives(PROGRAM) == {
        "all-gather": (1, 64),
        "all-gather (async)": (1, 64),
        "all-reduce": (2, 4 * 16 + 4),
        "all-reduce (async)": (1, 4 * 16),
        "reduce-scatter": (1, 4 * 64 * 32),
    }


def test_a_stray_all_to_all_shows():
    stray = PROGRAM.replace("ROOT %all-reduce.9 = f32[] all-reduce(", "ROOT %x.9 = f32[8]{0} all-to-all(")
    assert aot_compile.collectives(stray)["all-to-all"] == (1, 32)


@pytest.mark.parametrize(("shape", "size"), [("f32[]", 4), ("(bf16[2,3]{1,0}, pred[5])", 17), ("()", 0)])
def test_bytes_of_shapes(shape, size):
    assert aot_compile.array_bytes(shape) == size


def test_what_the_compiler_says_of_too_large_a_program():
    message = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error.\nUsed 22.10G of 15.75G hbm. Exceeded.\nmore"
    refused = aot_compile.refusal(message)
    assert refused.startswith("Used 22.10G of 15.75G hbm.")
    report = aot_compile.Report(8, 1.0, 15.75 * GIB, None, {}, refused)
    assert not report.fits and report.needed == pytest.approx(22.1 * GIB)


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize(("slope", "most"), [(0.9, 10), (0.31, 31), (30.0, 0)])
def test_the_largest_batch_is_found_in_few_compiles(slope, most, silent):
    """6 GiB and so much a row, of 15.75; a compiler may not say by how much a program is too large."""
    compiled = []

    def compile_rows(rows: int):
        compiled.append(rows)
        needed = int((6 + slope * rows) * GIB)
        if needed > 15.75 * GIB:
            refused = "no" if silent else f"Used {needed / GIB:.2f}G of 15.75G hbm."
            return aot_compile.Report(rows, 1.0, 15.75 * GIB, None, {}, refused)
        return aot_compile.Report(rows, 1.0, 15.75 * GIB, aot_compile.Memory(needed, 0, 0, 0, 0), {})

    reports = aot_compile.largest_batch(compile_rows, first=4)
    assert max((rows for rows, report in reports.items() if report.fits), default=0) == most
    assert len(compiled) == len(set(compiled)) <= 7


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, **options)


needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (extra [tpu])")


@needs_libtpu
def test_a_step_compiles_for_a_tpu_without_one(tmp_path):
    """Under ZeRO: parameters are gathered, gradients sent to their owners, and activations stay where they are."""
    report = tmp_path / "report.json"
    config = f"{Path(__file__).parent}/pod_config.py"
    overrides = ("--config.mesh.fsdp=4", "--config.accumulate=2", "--config.dtype=bfloat16")
    done = run("--config", config, "--topology", "v5e:2x2", "--report", str(report), *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 chips, data 1 x fsdp 4, batch 16 = 4 chips x 2 parts x 2" in done.stdout and "it fits" in done.stdout
    found = json.loads(report.read_text())
    memory, sums = found["memory"], found["collectives"]
    assert memory["arguments"] < memory["peak"] < found["needed"] == memory["peak"] + memory["code"] < 2 * GIB
    # Four float32 copies of 2.4 million parameters, the large ones in quarters, and four rows of a batch.
    assert 1e7 < memory["arguments"] < 4e7
    assert "all-to-all" not in sums
    # Once a step every parameter that is split is gathered; its gradient goes back to where it is split.
    assert sums["all-gather"][0] == 13
    assert sums["reduce-scatter"][1] == sums["all-gather"][1] > 1e6


@needs_libtpu
@pytest.mark.slow
def test_slices_exchange_gradients_once_a_step(tmp_path):
    """What crosses the data centre's network is sent and received; none of it stands in the loop over the parts."""
    program = tmp_path / "program.txt"
    overrides = ("--config.mesh.fsdp=4", "--config.accumulate=4", "--config.dtype=bfloat16")
    config = ("--config", f"{Path(__file__).parent}/pod_config.py", "--config.data.batch_size=32")
    done = run(*config, "--topology", "v5e:2x2", "--slices", "2", "--program", str(program), *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    computation, sent = "", set()
    for line in program.read_text().splitlines():
        if line.endswith("{") and not line.startswith(" "):
            computation = line.split()[0]
        if " send(" in line:
            sent.add(computation)
    assert sent == {"ENTRY"}


SMALL_JUDGES = """
import runpy, sys
from dreamlite_jax.models.qwen_vl.config import QwenVLConfig, TextTowerConfig, VisionTowerConfig
from dreamlite_jax.rewards import backbones

def small(family, **vision):
    text = TextTowerConfig(
        151666, 512, 512, 2, 2, 1, 128, 1e6, (16, 24, 24), mrope_interleaved=False, qk_norm=False, qkv_bias=True
    )
    return QwenVLConfig(text, VisionTowerConfig(2, 256, 512, 2, 512, family=family, patch_size=14, **vision))

backbones.BACKBONES["qwen2_vl_7b"] = small("qwen2_vl")
backbones.BACKBONES["qwen2_5_vl_7b"] = small("qwen2_5_vl", full_blocks=(1,), window_px=112)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
JUDGES = [
    {"kind": "hpsv3", "tasks": ("generate",), "size_px": (128, 128)},
    {"kind": "editreward", "tasks": ("edit",), "size_px": (128, 128), "backbone": "qwen2_5_vl_7b"},
]
POST = {
    "refl": {"rewards": JUDGES, "steps": 2},
    "dmd": {"fake_updates": 2, "gan_generator_weight": 5e-3, "gan_fake_weight": 1e-2},
}


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["refl", "dmd2"])
def test_steps_of_post_training_compile_without_judges_and_teachers(tmp_path, stage):
    """Small judges of the released families; their parameters are arguments, in quarters."""
    report, part = tmp_path / "report.json", {"refl": "refl", "dmd2": "dmd"}[stage]
    overrides = [
        f"--config.stage={stage}", f"--config.{part}={POST[part]}", "--config.mesh.fsdp=4", "--config.dtype=bfloat16",
        "--config.model.guidance_scale=1.0", "--config.model.image_guidance_scale=1.0",
    ]  # fmt: skip
    command = [sys.executable, "-c", SMALL_JUDGES, SCRIPT, "--config", f"{Path(__file__).parent}/pod_config.py"]
    done = subprocess.run(
        [*command, "--topology", "v5e:2x2", "--report", str(report), *overrides],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert "all-to-all" not in found["collectives"] and found["collectives"]["reduce-scatter"][1] > 1e6
    if stage == "refl":
        tables = 2 * 151666 * 512 * 2  # bytes of the judges' embeddings, most of all parameters
        assert tables / 4 < found["memory"]["arguments"] < tables / 2


def test_reports_are_sure_of_a_place_before_anything_is_compiled(tmp_path):
    (tmp_path / "file").write_text("a file")
    config = ("--config", f"{Path(__file__).parent}/pod_config.py", "--topology", "v5e:2x2")
    for flag, place, said in (
        ("--report", "file/report.json", "--report .*file cannot be made: .*file is a file"),
        ("--program", ".", "--program .* is a folder"),
    ):
        with pytest.raises(UserError, match=said):
            aot_compile.parse([*config, flag, str(tmp_path / place)])
    args, _ = aot_compile.parse([*config, "--report", str(tmp_path / "new" / "report.json")])
    assert args.report.name == "report.json" and not (tmp_path / "new").exists()


@needs_libtpu
def test_what_cannot_be_compiled_is_bad_input():
    config = f"{Path(__file__).parent}/pod_config.py"
    for arguments, said in (
        (("--topology", "v9z:4x4"), "--topology v9z:4x4 is not known"),
        (("--topology", "v5e:2x2", "--config.data.batch_size=6"), "6 is not a multiple of 4 devices"),
    ):
        done = run("--config", config, *arguments)
        assert done.returncode == 2 and said in done.stderr, done.stdout + done.stderr
