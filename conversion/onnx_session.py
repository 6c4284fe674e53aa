"""ONNX files under onnxruntime, without JAX."""

from pathlib import Path
from typing import Any

from .resources import bounded_threads


def open_session(path: Path, threads: int = 0) -> Any:
    """An onnxruntime session on the CPU; `threads` 0: one for each core."""
    import onnxruntime

    threads = bounded_threads(threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
