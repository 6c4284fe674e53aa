"""JAX → StableHLO → LiteRT flatbuffer, without TensorFlow.

The graph is traced with the weights as arguments, so that no copy of them passes through the tracer or its text form;
they are then bound in the converter's module as resources that point at our buffers.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export as jax_export

from . import culprit
from .graph import Graph
from .runtime import SIGNATURE

METADATA = "dreamlite"
INLINE_ELEMENTS = 1024  # smaller constants go inline, where the converter can fold them
LARGEST_FILE = 2**31 - 1  # flatbuffers address 2 GiB


def convert(graph: Graph, path: str | Path, metadata: Mapping[str, Any]) -> None:
    """Writes `graph` as a .tflite file with one named signature and `metadata` embedded as JSON.

    The entry "dreamlite" of the file's metadata also says what every input and output means.

    Raises:
      ConversionError: the converter does not take the graph; the message names the layer.
    """
    leaves, tree = jax.tree.flatten(graph.params)
    exported = _export(graph, leaves, tree)
    described = {
        **metadata,
        "signature": SIGNATURE,
        "inputs": describe(graph.inputs),
        "outputs": describe([graph.output]),
    }
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.part")
    try:
        _lower(exported, leaves, graph, json.dumps(described), temporary)
        os.replace(temporary, path)
    except ValueError as error:  # what the converter raises, without a word of the layer
        raise ConversionError(graph, error) from error
    finally:
        temporary.unlink(missing_ok=True)


class ConversionError(RuntimeError):
    """The converter refused a graph; the message names the layers that it refuses by themselves."""

    def __init__(self, graph: Graph, error: Exception):
        layers = culprit.culprits(graph, convert_alone)
        said = str(error).strip().splitlines()[0]
        super().__init__(
            f"{graph.component} cannot be converted: "
            + (f"the converter refuses {'; '.join(layers)}" if layers else "no layer alone is refused")
            + f". It said: {said}"
        )


def convert_alone(graph: Graph, path: Path) -> None:
    """Writes a graph without checks, metadata or search for the culprit."""
    leaves, tree = jax.tree.flatten(graph.params)
    _lower(_export(graph, leaves, tree), leaves, graph, "{}", path)


def describe(ports) -> list[dict[str, Any]]:
    """Ports as JSON has them."""
    return [{k: v for k, v in dataclasses.asdict(port).items() if v is not None} for port in ports]


def _export(graph: Graph, leaves: list[np.ndarray], tree: Any) -> bytes:
    """The traced graph as a portable StableHLO artifact; its first arguments are the weights."""

    def flat(*args: jax.Array) -> jax.Array:
        return graph.apply(jax.tree.unflatten(tree, args[: len(leaves)]), *args[len(leaves) :])

    flat.__name__ = graph.component  # operations are named after it
    specs = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    specs += [jax.ShapeDtypeStruct(port.shape, np.dtype(port.dtype)) for port in graph.inputs]
    return jax_export.export(jax.jit(flat, keep_unused=True), platforms=["cpu"])(*specs).mlir_module_serialized


def _lower(artifact: bytes, leaves: list[np.ndarray], graph: Graph, metadata: str, path: Path) -> None:
    from litert_converter import converter_api_ext as api
    from litert_converter.mlir import ir, passmanager
    from litert_converter.mlir.dialects import stablehlo

    context = ir.Context()
    api.prepare_mlir_context(context)
    with context, ir.Location.unknown():
        module = stablehlo.deserialize_portable_artifact(context, artifact)
        if not isinstance(module, ir.Module):
            module = ir.Module.parse(str(module))
        _bind_weights(module, leaves)
        for attribute in list(module.operation.attributes):
            name = getattr(attribute, "name", attribute)
            if name.startswith(("jax.", "mhlo.")):
                del module.operation.attributes[name]
        api.set_signature(
            module.operation,
            signature_name=SIGNATURE,
            input_names=[port.name for port in graph.inputs],
            output_names=[graph.output.name],
        )
        module.operation.attributes["tfl.metadata"] = ir.DictAttr.get({METADATA: ir.StringAttr.get(metadata)})
        config = api.ConvertToTFLConfig()
        config.model_origin_framework = "UNSET"
        config.enable_x64 = False
        config.canonicalizing_inf_as_min_max_float = False  # it would read every weight, which resources do not allow
        api.run_convert_to_tfl_passes(module, passmanager.PassManager(), config)
        api.export_flatbuffer_to_file(module.operation, str(path))


def _bind_weights(module: Any, leaves: list[np.ndarray]) -> None:
    """Replaces the leading arguments of `main` by constants. Resources refer to `leaves`, which must outlive them."""
    from litert_converter.mlir import ir
    from litert_converter.mlir.dialects import arith, stablehlo

    functions = [op for op in module.body.operations if op.operation.name == "func.func"]
    (main,) = [f for f in functions if ir.StringAttr(f.attributes["sym_name"]).value == "main"]
    block, count = main.body.blocks[0], len(leaves)
    with ir.InsertionPoint.at_block_begin(block):
        for i, leaf in enumerate(leaves):
            argument = block.arguments[i]
            if leaf.size >= INLINE_ELEMENTS:
                attribute = ir.DenseResourceElementsAttr.get_from_buffer(leaf, f"weight_{i}", argument.type)
                constant = arith.ConstantOp(argument.type, attribute)
            else:
                element = ir.RankedTensorType(argument.type).element_type
                attribute = ir.DenseElementsAttr.get(leaf, type=element, shape=leaf.shape)
                constant = stablehlo.ConstantOp(attribute)
            argument.replace_all_uses_with(constant.results[0])
    for i in reversed(range(count)):
        block.erase_argument(i)
    function_type = ir.FunctionType(ir.TypeAttr(main.attributes["function_type"]).value)
    trimmed = ir.FunctionType.get(list(function_type.inputs)[count:], list(function_type.results))
    main.attributes["function_type"] = ir.TypeAttr.get(trimmed)
    if "arg_attrs" in main.attributes:
        main.attributes["arg_attrs"] = ir.ArrayAttr.get(list(ir.ArrayAttr(main.attributes["arg_attrs"]))[count:])
