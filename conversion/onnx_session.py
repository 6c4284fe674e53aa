"""ONNX files under onnxruntime, without JAX."""

from pathlib import Path
from typing import Any


def open_session(path: Path, threads: int = 0) -> Any:
    """An onnxruntime session on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
