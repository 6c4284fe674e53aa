"""What is inside a .tflite file: operations by kind, and whatever a phone's delegates are known to refuse outright."""

import collections
import dataclasses
import json
import math
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dreamlite_jax.errors import UserError

MAX_DIMENSIONS = 4
WEIGHTED = ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D")
# Measured with ai-edge-litert 2.3.0 on x86-64 Linux, kernels of XNNPACK; see `run_memory`.
PER_OPERATION_BYTES = 400  # what the interpreter and the kernels keep of one
PER_CHANNEL_BYTES = 12  # bias, scale and sum of the weights, beside a channel of whole numbers
LIBRARY_BYTES = 12_600_000  # LiteRT itself, once in a process
ITEM_BYTES = {"INT8": 1, "UINT8": 1, "BOOL": 1, "INT4": 1, "FLOAT16": 2, "INT16": 2}  # others: 4
WIDE_TYPES = ("INT64", "UINT64", "FLOAT64", "COMPLEX64", "COMPLEX128")


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation: its kind, the layer that made it (from the name of its output) and its tensors."""

    kind: str
    layer: str
    inputs: tuple["Tensor", ...]
    outputs: tuple["Tensor", ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a graph; `constant` says whether its values are in the file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    dynamic: bool
    constant: bool


@dataclasses.dataclass(frozen=True)
class Audit:
    """Findings on one file.

    Attributes:
      ops: count by kind, over all subgraphs.
      faults: sentences, each naming the layer; empty for a file that every delegate can at least read.
    """

    file_bytes: int
    ops: dict[str, int]
    faults: tuple[str, ...]


def audit(path: str | Path) -> Audit:
    """Counts a file's operations and names custom and FLEX ops, more than four dimensions, dynamic and 64-bit tensors.

    Raises:
      UserError: the file is not a LiteRT model.
    """
    counts: collections.Counter[str] = collections.Counter()
    faults: dict[str, None] = {}  # in order, each once
    unpacked: set[str] = set()  # constants that are stored in fewer bits
    for operation in operations(path):
        counts[operation.kind] += 1
        where = f"in {operation.layer}"
        if operation.kind.startswith(("CUSTOM", "FLEX", "STABLEHLO_")):
            faults[f"{operation.kind} is no builtin operation, {where}"] = None
        for tensor in (*operation.inputs, *operation.outputs):
            if len(tensor.shape) > MAX_DIMENSIONS:
                faults[f"{operation.kind} has a tensor of {len(tensor.shape)} dimensions {tensor.shape}, {where}"] = (
                    None
                )
            if tensor.dtype in WIDE_TYPES:
                faults[f"{operation.kind} has a tensor of {tensor.dtype}, {where}"] = None
            if tensor.dynamic:
                faults[f"{operation.kind} has a tensor without a static shape, {where}"] = None
        if operation.kind == "DEQUANTIZE" and operation.inputs[0].constant:
            unpacked.add(operation.outputs[0].name)
        weights = operation.inputs[1] if operation.kind in WEIGHTED else None
        if weights and not weights.constant and weights.name not in unpacked:
            faults[f"{operation.kind} has weights that are computed at run time, {where}"] = None
    return Audit(Path(path).stat().st_size, dict(counts.most_common()), tuple(faults))


def operations(path: str | Path) -> Iterator[Operation]:
    """Every operation of every subgraph, in order."""
    from ai_edge_litert import schema_py_generated as schema

    kinds = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}
    types = {v: k for k, v in vars(schema.TensorType).items() if isinstance(v, int)}
    model = _read(path)

    def kind(index: int) -> str:
        code = model.OperatorCodes(index)
        builtin = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
        if builtin != schema.BuiltinOperator.CUSTOM:
            return kinds[builtin]
        name = (code.CustomCode() or b"").decode()
        return name.upper() if name.startswith("Flex") else f"CUSTOM:{name}"

    def tensor(graph: Any, index: int) -> Tensor:
        t = graph.Tensors(index)
        signature = [t.ShapeSignature(i) for i in range(t.ShapeSignatureLength())]
        buffer = model.Buffers(t.Buffer())
        return Tensor(
            (t.Name() or b"").decode(),
            tuple(t.Shape(i) for i in range(t.ShapeLength())),
            types[t.Type()],
            any(size < 0 for size in signature),
            buffer.DataLength() > 0 or buffer.Size() > 0,
        )

    for g in range(model.SubgraphsLength()):
        graph = model.Subgraphs(g)
        for i in range(graph.OperatorsLength()):
            op = graph.Operators(i)
            inputs = tuple(tensor(graph, op.Inputs(k)) for k in range(op.InputsLength()) if op.Inputs(k) >= 0)
            outputs = tuple(tensor(graph, op.Outputs(k)) for k in range(op.OutputsLength()))
            yield Operation(kind(op.OpcodeIndex()), layer_of(outputs[0].name) if outputs else "?", inputs, outputs)


def activation_bytes(path: str | Path) -> int:
    """Most bytes of activations that are alive at once, each from its making to its last use, in the file's order."""
    ops = list(operations(path))
    last = {tensor.name: i for i, op in enumerate(ops) for tensor in (*op.inputs, *op.outputs) if not tensor.constant}
    alive: dict[str, int] = {}
    peak = 0
    for i, op in enumerate(ops):
        for tensor in (*op.inputs, *op.outputs):
            if not tensor.constant:
                alive[tensor.name] = _bytes(tensor)
        peak = max(peak, sum(alive.values()))
        alive = {name: size for name, size in alive.items() if last[name] > i}
    return peak


@dataclasses.dataclass(frozen=True)
class RunMemory:
    """What a process grows by that loads a file and runs it on CPU, in bytes.

    Attributes:
      file: pages of the file that are mapped. Of a table of word embeddings only the rows of a prompt are read, so it
        does not count.
      packed: copies of the weights in the layout that the kernels want. Of half precision they are float32.
      activations: alive at once, and what is kept of every operation.
      library: LiteRT itself, once in a process.
    """

    file: int
    packed: int
    activations: int
    library: int = LIBRARY_BYTES

    @property
    def total(self) -> int:
        return self.file + self.packed + self.activations + self.library


def run_memory(path: str | Path) -> RunMemory:
    """Predicts the memory of a run, within 15 % of what was measured of every recipe."""
    ops = list(operations(path))
    tables = {op.inputs[1].name: op.inputs[1] for op in ops if op.kind == "EMBEDDING_LOOKUP" and op.inputs[1].constant}
    file = Path(path).stat().st_size - sum(_bytes(table) for table in tables.values())
    packed = sum(_packed_bytes(op) for op in ops if op.kind in WEIGHTED)
    return RunMemory(file, packed, activation_bytes(path) + PER_OPERATION_BYTES * len(ops))


def _packed_bytes(op: Operation) -> int:
    """Of the copy of one operation's weights. Half precision comes here unpacked, by a DEQUANTIZE."""
    weights = op.inputs[1]
    count = math.prod(weights.shape)
    if weights.dtype not in ("INT8", "INT4"):
        return 4 * count
    channels = weights.shape[-1 if op.kind == "DEPTHWISE_CONV_2D" else 0]
    return count // (2 if weights.dtype == "INT4" else 1) + PER_CHANNEL_BYTES * channels


def preserved_bytes(path: str | Path) -> int:
    """Bytes of all activations together, which calibration keeps at once."""
    made = {tensor.name: tensor for op in operations(path) for tensor in op.outputs}
    return sum(_bytes(tensor) for tensor in made.values())


def _bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * ITEM_BYTES.get(tensor.dtype, 4)


def layer_of(tensor_name: str) -> str:
    """The module that made a tensor: "jit(unet)/mid_block/resnets_0/conv1/pointwise/dot;…" is mid_block/…/pointwise."""
    first = tensor_name.split(";")[0]
    parts = [part for part in first.split("/") if not part.startswith("jit(")]
    return "/".join(parts[:-1]) or first


def read_metadata(path: str | Path, name: str = "dreamlite") -> dict[str, Any]:
    """The JSON that `litert.convert` embedded. Raises `UserError` when there is none."""
    model = _read(path)
    for i in range(model.MetadataLength()):
        entry = model.Metadata(i)
        if entry.Name() == name.encode():
            return json.loads(_buffer_bytes(path, model.Buffers(entry.Buffer())).rstrip(b"\0"))
    raise UserError(f"{path} has no metadata {name!r}; it must be a file written by conversion.to_litert")


def _buffer_bytes(path: str | Path, buffer: Any) -> bytes:
    """Content of a buffer, which large files keep behind the flatbuffer."""
    if buffer.DataLength():
        return buffer.DataAsNumpy().tobytes()
    with Path(path).open("rb") as file:
        file.seek(buffer.Offset())
        return file.read(buffer.Size())


def random_input(port: dict[str, Any], seed: int) -> np.ndarray:
    """Values of one input: token ids of the whole vocabulary, a bias with a padded tail, or a normal sample."""
    rng = np.random.default_rng(seed)
    if port["dtype"] == "int32":
        return rng.integers(0, port["below"], port["shape"]).astype(np.int32)
    values = rng.standard_normal(port["shape"]).astype(np.float32)
    if port["name"] == "text_bias":
        values[...] = 0.0
        values[:, port["shape"][1] * 3 // 4 :] = -10000.0
    return values


def _read(path: str | Path) -> Any:
    from ai_edge_litert import schema_py_generated as schema

    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    with path.open("rb") as file:
        if file.read(8)[4:] != b"TFL3":
            raise UserError(f"{path} is not a LiteRT model: it does not begin with TFL3")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return schema.Model.GetRootAs(data, 0)
