"""The export form as ONNX: the traced graph, operation by operation, with norms and softmax as standard nodes.

Convolutions of ONNX are NCHW and our graphs are NHWC. A value therefore remembers in which layouts it exists; work that
does not care about layout is done in the one at hand, so that transposes appear only where layouts really meet.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dreamlite_jax.errors import UserError

from .graph import CALLS, Graph
from .graph_ops import marked_native

TO_NCHW, TO_NHWC = (0, 3, 1, 2), (0, 2, 3, 1)
EXTERNAL_BYTES = 512 * 1024**2  # above this the weights go to a file of their own
# First operator set with the node, of norms with a node for each; before it the arithmetic is written out.
SINCE = {
    "native.layer_norm": 17,
    "aten.gelu.default": 20,
    "native.group_norm": 21,
    "native.rms_norm": 23,
    "native.softmax": 13,
    "odml.embedding_lookup": 13,
    "tfl.resize_nearest_neighbor": 13,
}
OPSETS = (17, 23)
UNARY = {"abs": "Abs", "logistic": "Sigmoid", "tanh": "Tanh", "exp": "Exp", "erf": "Erf", "neg": "Neg", "sqrt": "Sqrt"}
BINARY = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min"}


@dataclasses.dataclass
class Value:
    """A tensor of the graph: its name in each layout it exists in, and its NHWC shape (1 where it broadcasts)."""

    shape: tuple[int, ...]
    nhwc: str | None = None
    nchw: str | None = None
    array: np.ndarray | None = None  # of a constant

    @property
    def only_nchw(self) -> bool:
        return self.nhwc is None and self.nchw is not None


def export(graph: Graph, path: Path, *, opset: int = 23, precision: str = "fp32", metadata: str = "") -> None:
    """Writes `graph` as an ONNX model, inputs and outputs float32 (token ids int32), weights in `precision`.

    Args:
      metadata: JSON that is stored in the model's metadata under "dreamlite".

    Raises:
      UserError: an operator set that cannot hold the graph.
    """
    import onnx

    check_opset(opset)
    with marked_native():
        shapes = [jax.ShapeDtypeStruct(port.shape, port.dtype) for port in graph.inputs]
        closed = jax.make_jaxpr(graph.apply)(graph.params, *shapes)
    weights = jax.tree.leaves(graph.params)
    writer = _Writer(path, opset, np.dtype(np.float16 if precision == "fp16" else np.float32), graph.weight_bytes)
    environment: dict[Any, Value] = {}
    of_weights, of_inputs = closed.jaxpr.invars[: len(weights)], closed.jaxpr.invars[len(weights) :]
    for variable, array in zip(of_weights, weights, strict=True):
        environment[variable] = Value(array.shape, array=array)
    for variable, port in zip(of_inputs, graph.inputs, strict=True):
        environment[variable] = writer.model_input(port.name, port.shape, port.dtype)
    (output,) = writer.run(closed.jaxpr, closed.consts, environment)
    writer.finish(output, graph.output.name, graph.output.shape, metadata)
    onnx.checker.check_model(str(path))


def check_opset(opset: int) -> None:
    if not OPSETS[0] <= opset <= OPSETS[1]:
        raise UserError(f"opset is {opset}; it must be from {OPSETS[0]} to {OPSETS[1]}")


class _Writer:
    """Nodes and weights of one model while it is written."""

    def __init__(self, path: Path, opset: int, dtype: np.dtype, weight_bytes: int):
        from onnx import TensorProto

        self.opset, self.dtype, self.path = opset, dtype, path
        self.float_type = TensorProto.FLOAT16 if dtype == np.float16 else TensorProto.FLOAT
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.inputs: list[Any] = []
        self.scope = ""
        self._count = 0
        self._shared: dict[Any, str] = {}
        large = weight_bytes * dtype.itemsize // 4 > EXTERNAL_BYTES
        self._weights_file = path.with_name(path.name + ".data").open("wb") if large else None

    # --- parts of the file

    def model_input(self, name: str, shape: Sequence[int], dtype: str) -> Value:
        from onnx import TensorProto, helper

        kind = TensorProto.INT32 if dtype == "int32" else TensorProto.FLOAT
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        if dtype == "float32" and self.dtype == np.float16:
            name = self.node("Cast", [name], to=self.float_type)
        return Value(tuple(shape), nhwc=name)

    def node(self, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Adds a node with one output and returns the output's name, which begins with the layer's."""
        from onnx import helper

        self._count += 1
        name = f"{self.scope or 'graph'}/{kind}_{self._count}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, array: np.ndarray, key: Any = None, *, exact: bool = False) -> str:
        """Name of a stored tensor; floats are in the model's precision unless `exact`. `key` finds it again."""
        if key is not None and key in self._shared:
            return self._shared[key]
        from onnx import TensorProto, numpy_helper

        narrowed = array.astype(self.dtype) if array.dtype == np.float32 and not exact else array
        array = np.ascontiguousarray(narrowed).reshape(array.shape)
        self._count += 1
        name = f"{self.scope or 'graph'}/constant_{self._count}"
        if self._weights_file is None or array.nbytes < 1024:
            tensor = numpy_helper.from_array(array, name)
        else:
            tensor = TensorProto(name=name, dims=array.shape, data_type=numpy_helper.from_array(array[:0]).data_type)
            tensor.data_location = TensorProto.EXTERNAL
            where = {"location": self.path.name + ".data", "offset": self._weights_file.tell(), "length": array.nbytes}
            for entry, value in where.items():
                tensor.external_data.add(key=entry, value=str(value))
            self._weights_file.write(array.data)
        self.initializers.append(tensor)
        if key is not None:
            self._shared[key] = name
        return name

    def finish(self, output: Value, name: str, shape: Sequence[int], metadata: str) -> None:
        from onnx import TensorProto, helper, save_model

        last = self.nhwc(output)
        if self.dtype == np.float16:
            last = self.node("Cast", [last], to=TensorProto.FLOAT)
        self.nodes.append(helper.make_node("Identity", [last], [name], name=name))
        info = helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        body = helper.make_graph(self.nodes, self.path.stem, self.inputs, [info], self.initializers)
        model = helper.make_model(
            body, opset_imports=[helper.make_opsetid("", self.opset)], producer_name="dreamlite_jax"
        )
        model.ir_version = min(model.ir_version, 11 if self.opset > 21 else 10)
        if metadata:
            helper.set_model_props(model, {"dreamlite": metadata})
        if self._weights_file is not None:
            self._weights_file.close()
        save_model(model, str(self.path))

    # --- layouts

    def nhwc(self, value: Value) -> str:
        if value.nhwc is None and value.nchw is None:
            key = ("scalar", value.array.item(), str(value.array.dtype)) if value.shape == () else None
            value.nhwc = self.constant(value.array, key)
        elif value.nhwc is None:
            value.nhwc = self.node("Transpose", [value.nchw], perm=TO_NHWC)
        return value.nhwc

    def nchw(self, value: Value) -> str:
        if value.nchw is None and value.array is not None and len(value.shape) == 4:
            value.nchw = self.constant(value.array.transpose(TO_NCHW))
        elif value.nchw is None:
            value.nchw = self.node("Transpose", [self.nhwc(value)], perm=TO_NCHW)
        return value.nchw

    def _full(self, value: Value, shape: tuple[int, ...]) -> Value:
        """The value at its whole size, where it was left to broadcast."""
        if value.shape == shape:
            return value
        return Value(shape, nhwc=self.node("Expand", [self.nhwc(value), self._integers(shape)]))

    # --- the walk

    def run(self, jaxpr: Any, constants: Sequence[Any], environment: dict[Any, Value]) -> list[Value]:
        """Writes the operations of a jaxpr whose inputs are in `environment`; returns its outputs."""
        environment.update(
            (variable, Value(np.shape(constant), array=np.asarray(constant)))
            for variable, constant in zip(jaxpr.constvars, constants, strict=True)
        )

        def read(atom: Any) -> Value:
            if hasattr(atom, "val"):
                return Value(np.shape(atom.val), array=np.asarray(atom.val, atom.aval.dtype))
            return environment[atom]

        for equation in jaxpr.eqns:
            inputs = [read(atom) for atom in equation.invars]
            with self._named(str(equation.source_info.name_stack)):
                outputs = self._write(equation, inputs)
            environment.update(zip(equation.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    @contextlib.contextmanager
    def _named(self, scope: str) -> Iterator[None]:
        before = self.scope
        self.scope = "/".join(part for part in (before, scope) if part)
        yield
        self.scope = before

    def _write(self, equation: Any, inputs: list[Value]) -> list[Value]:
        name, parameters = equation.primitive.name, equation.params
        if name == "composite":
            return self._composite(parameters, inputs)
        if name in CALLS:
            inner = parameters.get("jaxpr") or parameters.get("call_jaxpr")
            return self._inline(inner, inputs)
        shape = equation.outvars[0].aval.shape
        if name not in BINARY and name != "broadcast_in_dim":
            inputs = [self._full(v, atom.aval.shape) for v, atom in zip(inputs, equation.invars, strict=True)]
        if name in UNARY:
            return [self._elementwise(UNARY[name], inputs, shape)]
        if name in BINARY:
            return [self._elementwise(BINARY[name], inputs, shape)]
        handler = getattr(self, f"_{name}", None)
        if handler is None:
            raise UserError(f"the operation {name} in {self.scope} has no ONNX form here")
        return [handler(parameters, inputs, shape)]

    def _inline(self, inner: Any, inputs: list[Value]) -> list[Value]:
        jaxpr = getattr(inner, "jaxpr", inner)
        return self.run(jaxpr, getattr(inner, "consts", ()), dict(zip(jaxpr.invars, inputs, strict=True)))

    def _elementwise(self, kind: str, inputs: list[Value], shape: tuple[int, ...]) -> Value:
        if any(value.only_nchw for value in inputs):
            names = [self.nchw(v) if len(v.shape) == 4 else self.nhwc(v) for v in inputs]  # scalars have one layout
            return Value(shape, nchw=self.node(kind, names))
        return Value(shape, nhwc=self.node(kind, [self.nhwc(value) for value in inputs]))

    def _composite(self, parameters: dict[str, Any], inputs: list[Value]) -> list[Value]:
        name = parameters["name"]
        attributes = {key: leaves[0] for key, leaves, _ in parameters["attributes"] if leaves}
        if self.opset < SINCE[name]:
            return self._inline(parameters["jaxpr"], inputs)
        x, shape = inputs[0], inputs[0].shape
        if name == "aten.gelu.default":
            return [self._elementwise("Gelu", inputs, shape)]
        if name == "native.softmax":
            return [Value(shape, nhwc=self.node("Softmax", [self.nhwc(x)], axis=-1))]
        if name == "odml.embedding_lookup":
            out = self.node("Gather", [self.nhwc(inputs[1]), self.nhwc(x)], axis=0)
            return [Value((*shape, inputs[1].shape[1]), nhwc=out)]
        if name == "tfl.resize_nearest_neighbor":
            return [self._resize(x)]
        epsilon = float(attributes["eps"])
        if name == "native.group_norm":
            return [self._group_norm(x, *inputs[1:], int(attributes["groups"]), epsilon)]
        names = [self.nhwc(value) for value in inputs[1:]]  # scale and bias
        kind = {"native.layer_norm": "LayerNormalization", "native.rms_norm": "RMSNormalization"}[name]
        return [Value(shape, nhwc=self.node(kind, [self.nhwc(x), *names], axis=-1, epsilon=epsilon))]

    def _group_norm(self, x: Value, scale: Value, bias: Value, groups: int, epsilon: float) -> Value:
        """Instance normalisation of the groups, each one channel of (b, groups, c / groups · h · w).

        GroupNormalization (operator set 21) says it in one node, but onnxruntime 1.31 expands that into 29 which take
        the variance as E[x²] − E[x]²: no digit is left where the mean is a thousand deviations.
        """
        b, h, w, c = x.shape
        joined = self.node("Reshape", [self.nchw(x), self._integers((b, groups, c // groups * h * w))])
        ones, zeros = (self.constant(np.full(groups, v, np.float32), key=("groups", groups, v)) for v in (1.0, 0.0))
        unit = self.node("InstanceNormalization", [joined, ones, zeros], epsilon=epsilon)
        normalised = Value(x.shape, nchw=self.node("Reshape", [unit, self._integers((b, c, h, w))]))
        scale, bias = (Value((1, 1, 1, c), array=value.array.reshape(1, 1, 1, c)) for value in (scale, bias))
        return self._elementwise("Add", [self._elementwise("Mul", [normalised, scale], x.shape), bias], x.shape)

    def _resize(self, x: Value) -> Value:
        b, h, w, c = x.shape
        scales = self.constant(np.float32([1, 1, 2, 2]), key="twice", exact=True)
        out = self.node("Resize", [self.nchw(x), "", scales], mode="nearest", nearest_mode="floor",
                        coordinate_transformation_mode="asymmetric")  # fmt: skip
        return Value((b, 2 * h, 2 * w, c), nchw=out)

    # --- handlers, named after the primitives

    def _integers(self, values: Sequence[int]) -> str:
        return self.constant(np.array(values, np.int64), key=tuple(values))

    def _rsqrt(self, parameters, inputs, shape) -> Value:
        root = self._elementwise("Sqrt", inputs, shape)
        return self._elementwise("Reciprocal", [root], shape)

    def _square(self, parameters, inputs, shape) -> Value:
        return self._elementwise("Mul", inputs * 2, shape)

    def _stop_gradient(self, parameters, inputs, shape) -> Value:
        return inputs[0]

    def _convert_element_type(self, parameters, inputs, shape) -> Value:
        from onnx import TensorProto

        dtype = np.dtype(parameters["new_dtype"])
        to = TensorProto.INT32 if dtype.kind == "i" else self.float_type
        return Value(shape, nhwc=self.node("Cast", [self.nhwc(inputs[0])], to=to))

    def _reduce_sum(self, parameters, inputs, shape) -> Value:
        return self._reduce("ReduceSum", parameters, inputs, shape)

    def _reduce_max(self, parameters, inputs, shape) -> Value:
        return self._reduce("ReduceMax", parameters, inputs, shape)

    def _reduce(self, kind, parameters, inputs, shape) -> Value:
        axes = {"axes": parameters["axes"]} if kind == "ReduceMax" and self.opset < 18 else {}
        more = [] if axes else [self._integers(parameters["axes"])]
        return Value(shape, nhwc=self.node(kind, [self.nhwc(inputs[0]), *more], keepdims=0, **axes))

    def _reshape(self, parameters, inputs, shape) -> Value:
        return Value(shape, nhwc=self.node("Reshape", [self.nhwc(inputs[0]), self._integers(shape)]))

    def _squeeze(self, parameters, inputs, shape) -> Value:
        return self._reshape(parameters, inputs, shape)

    def _transpose(self, parameters, inputs, shape) -> Value:
        return Value(shape, nhwc=self.node("Transpose", [self.nhwc(inputs[0])], perm=parameters["permutation"]))

    def _broadcast_in_dim(self, parameters, inputs, shape) -> Value:
        """Only ranks grow here; sizes grow by the broadcasting of whatever reads the value."""
        (x,), kept = inputs[:1], parameters["broadcast_dimensions"]
        ranked = [1] * len(shape)
        for axis, size in zip(kept, x.shape, strict=True):
            ranked[axis] = size
        if x.array is not None:
            return Value(tuple(ranked), array=x.array.reshape(ranked))
        return Value(tuple(ranked), nhwc=self.node("Reshape", [self.nhwc(x), self._integers(ranked)]))

    def _concatenate(self, parameters, inputs, shape) -> Value:
        axis = parameters["dimension"]
        if len(shape) == 4 and any(value.only_nchw for value in inputs):
            names = [self.nchw(value) for value in inputs]
            return Value(shape, nchw=self.node("Concat", names, axis=TO_NCHW.index(axis)))
        return Value(shape, nhwc=self.node("Concat", [self.nhwc(value) for value in inputs], axis=axis))

    def _slice(self, parameters, inputs, shape) -> Value:
        steps = parameters["strides"] or (1,) * len(shape)
        bounds = (parameters["start_indices"], parameters["limit_indices"], range(len(shape)), steps)
        names = [self._integers(tuple(values)) for values in bounds]
        return Value(shape, nhwc=self.node("Slice", [self.nhwc(inputs[0]), *names]))

    def _dot_general(self, parameters, inputs, shape) -> Value:
        """x · kᵀ with equal leading axes or a two-dimensional k, and x · k."""
        (left, right), (batch, other_batch) = parameters["dimension_numbers"]
        x, k = inputs
        rank = len(k.shape)
        plain = left == (len(x.shape) - 1,) and batch == other_batch == tuple(range(len(batch)))
        if not plain or rank != len(batch) + 2 or right not in ((rank - 1,), (rank - 2,)):
            raise UserError(
                f"a product over the axes {parameters['dimension_numbers']} in {self.scope} has no ONNX form"
            )
        if right == (rank - 1,):
            order = (*range(rank - 2), rank - 1, rank - 2)
            if k.array is not None:
                name = self.constant(k.array.transpose(order), key=("transposed", id(k.array)))
            else:
                name = self.node("Transpose", [self.nhwc(k)], perm=order)
        else:
            name = self.nhwc(k)
        return Value(shape, nhwc=self.node("MatMul", [self.nhwc(x), name]))

    def _conv_general_dilated(self, parameters, inputs, shape) -> Value:
        x, kernel = inputs
        # Ours are OHWI, and HWIO where depthwise; `rhs_spec` lists the axes of (O, I, spatial…).
        weights = self.constant(kernel.array.transpose(parameters["dimension_numbers"].rhs_spec))
        (top, bottom), (left, right) = parameters["padding"]
        out = self.node("Conv", [self.nchw(x), weights], group=parameters["feature_group_count"],
                        strides=list(parameters["window_strides"]), pads=[top, left, bottom, right])  # fmt: skip
        return Value(shape, nchw=out)
