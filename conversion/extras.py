"""Packages that an extra of setup.cfg brings, looked for before any work. Without JAX."""

import importlib
import importlib.metadata
import os
from collections.abc import Sequence

from dreamlite_jax.errors import UserError

# Modules that a format is written and read with; what uses one imports it, so that a runtime needs no converter.
LITERT = ("ai_edge_litert.interpreter",)
TO_LITERT = ("litert_converter.converter_api_ext", *LITERT, "ai_edge_quantizer.quantizer")
ONNX = ("onnxruntime",)
TO_ONNX = ("onnx", *ONNX)
TO_SAVED_MODEL = ("tensorflow", "jax.experimental.jax2tf")


def check(command: str, modules: Sequence[str], extra: str = "convert") -> None:
    """Raises `UserError` for the packages among `modules` that are missing or broken, with what installs them."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read as TensorFlow is imported; it says much
    lacking = {}
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            cause = (error.name or module).split(".")[0].replace("_", "-")
            package = module.split(".")[0].replace("_", "-")
            if cause not in lacking:  # else said already, of the package that this one stands on
                lacking[package] = str(error)
    if lacking:
        raise UserError(
            f"{command} needs {', '.join(lacking)}: {'; '.join(lacking.values())}. Of a checkout, install them with: "
            f'python -m pip install -c constraints.txt ".[{extra}]"'
        )


def installed(*packages: str) -> list[str]:
    """Those of `packages`, names of one and the same on different machines, that are installed."""
    return [name for name in packages if any(importlib.metadata.distributions(name=name))]
