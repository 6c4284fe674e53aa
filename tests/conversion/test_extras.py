"""Commands without the packages of their extra: one line and exit code 2, before a model is loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conversion import exports, runtime, to_litert, to_onnx
from dreamlite_jax import model_folder
from dreamlite_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "command, module, named",
    [
        (to_litert, "litert_converter.converter_api_ext", "to_litert needs litert-converter: "),
        (to_litert, "ai_edge_litert.interpreter", "to_litert needs ai-edge-litert: "),
        (to_litert, "ai_edge_quantizer.quantizer", "to_litert needs ai-edge-quantizer: "),
        (to_onnx, "onnx", "to_onnx needs onnx: "),
        (to_onnx, "onnxruntime", "to_onnx needs onnxruntime: "),
    ],
)
def test_a_package_that_is_missing_is_named_before_any_work(small_model, tmp_path, monkeypatch, command, module, named):
    monkeypatch.setitem(sys.modules, module, None)  # as Python does for what cannot be imported
    for owner, work in ((exports, "load"), (model_folder, "load_params"), (model_folder, "find_model")):
        monkeypatch.setattr(owner, work, None)
    with pytest.raises(UserError, match=named) as raised:
        command.main(["--model", str(small_model), "--output", str(tmp_path / "out")])
    assert '".[convert]"' in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_the_runtime_without_its_package(litert_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    with pytest.raises(UserError, match=r"the LiteRT runtime needs ai-edge-litert: .*\.\[convert\]"):
        runtime.Runtime(litert_model)


def test_the_exit_code_is_that_of_bad_input_and_not_of_a_missed_floor(small_model, tmp_path):
    """A package that is there and broken, as an interrupted installation leaves it."""
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libonnx.so: cannot open shared object file')")
    flags = ["--model", str(small_model), "--output", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "conversion.to_onnx", *flags],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: to_onnx needs onnxruntime: libonnx.so: cannot open")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()
