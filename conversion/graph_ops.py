"""Operations of the export form: what a mobile runtime has a kernel for, in tensors of at most four dimensions.

They compute what `dreamlite_jax.models.blocks` computes, from the same weights laid out as LiteRT stores them: dense
kernels (out, in), convolutions (out, h, w, in), so that the converter has no large constants to transpose.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dreamlite_jax.models import blocks

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Node:
    """One module of the parameter tree: its name, and its children or arrays."""

    name: str
    tree: Mapping[str, Any]

    def sub(self, name: str) -> "Node":
        return Node(name, self.tree[name])

    def __getitem__(self, leaf: str) -> Array:
        return self.tree[leaf]

    def __contains__(self, name: str) -> bool:
        return name in self.tree


def scoped(function: Callable) -> Callable:
    """Names every operation inside after the module, so that a report can say which layer made an op."""

    @functools.wraps(function)
    def run(node: Node, *args: Any, **kwargs: Any) -> Any:
        with jax.named_scope(node.name):
            return function(node, *args, **kwargs)

    return run


def export_layout(tree: dict[str, Any], name: str = "") -> dict[str, Any]:
    """The parameter tree in LiteRT's layouts; `tree` is emptied on the way, so that weights are held once.

    The GEGLU projection becomes two dense layers, value and gate, because splitting an activation costs a copy. Their
    product is the largest activation of a block: the value is stored 16 times smaller and the layer after the product
    16 times larger, which changes no float32 number (the factor is a power of two) and keeps float16 from overflowing.
    """
    out: dict[str, Any] = {}
    for key in list(tree):
        value = tree.pop(key)
        if not isinstance(value, Mapping):
            out[key] = _leaf(np.asarray(value), key, name)
        elif name == "net_0" and key == "proj":
            kernels = np.split(np.asarray(value["kernel"]), 2, axis=1)
            biases = np.split(np.asarray(value["bias"]), 2)
            for part, kernel, bias in zip(("value", "gate"), kernels, biases, strict=True):
                scale = np.float32(1 / GATE_SCALE if part == "value" else 1.0)
                out[part] = {"kernel": np.ascontiguousarray(kernel.T * scale), "bias": bias * scale}
        else:
            out[key] = export_layout(value, key)
    if "net_0" in out and "net_2" in out:
        out["net_2"]["kernel"] *= np.float32(GATE_SCALE)
    return out


def _leaf(array: np.ndarray, key: str, module: str) -> np.ndarray:
    if key == "kernel" and array.ndim == 2:
        array = array.T
    elif key == "kernel" and array.ndim == 4 and module != "depthwise":
        array = array.transpose(3, 0, 1, 2)
    return np.ascontiguousarray(array)


# --- single operations, for formats that have them

_MARK_NATIVE: contextvars.ContextVar[bool] = contextvars.ContextVar("mark_native", default=False)


@contextlib.contextmanager
def marked_native() -> Iterator[None]:
    """While tracing in here, norms and softmax are composites "native.…" around their arithmetic.

    LiteRT gets the arithmetic: its GPU accelerator does not take norm composites and finds softmax by itself.
    """
    token = _MARK_NATIVE.set(True)
    try:
        yield
    finally:
        _MARK_NATIVE.reset(token)


_WRITTEN_OUT: contextvars.ContextVar[bool] = contextvars.ContextVar("written_out", default=False)


@contextlib.contextmanager
def written_out() -> Iterator[None]:
    """While tracing in here, nothing is a composite and erf is `rational_erf`: plain arithmetic, for TensorFlow.

    TensorFlow 2.21 reads neither the composites of this JAX nor its erf.
    """
    token = _WRITTEN_OUT.set(True)
    try:
        yield
    finally:
        _WRITTEN_OUT.reset(token)


def _single(name: str, function: Callable[..., Array]) -> Callable[..., Array]:
    """A function of arrays as the one operation `name` that a format has for it, with attributes as keywords."""

    def run(*args: Array, **_: Any) -> Array:
        return function(*args)

    return run if _WRITTEN_OUT.get() else jax.lax.composite(run, name)


# The rational approximation of erf that XLA itself expands erf into (from Eigen), highest power of x² first. Beyond
# _ERF_END it is 1 in float32.
_ERF_ABOVE = (2.2905065861350646e-4, 3.4082910107109506e-3, 5.0955695062380861e-2, 1.8520832239976145e-1,
              1.128379143519084)  # fmt: skip
_ERF_BELOW = (-1.1791602954361697e-7, 2.3547966471313185e-5, 1.0179625278914885e-3, 1.4070470171167667e-2,
              1.1098505178285362e-1, 4.9746925110067538e-1, 1.0)  # fmt: skip
_ERF_END = 3.7439211627767994


def rational_erf(x: Array) -> Array:
    """erf of float32 within 3.2e-7, as `jax.lax.erf` on CPU, by products, sums and one quotient."""
    x = jnp.clip(x, -_ERF_END, _ERF_END)
    above, below = (functools.reduce(lambda y, c: y * (x * x) + np.float32(c), table[1:], np.float32(table[0]))
                    for table in (_ERF_ABOVE, _ERF_BELOW))  # fmt: skip
    return x * above / below


# --- half precision

PEAK = 128.0  # of what is squared under `half_safe`: squares stay below 65504, and their mean is no subnormal number
PEAK_FLOOR = 2.0**-8  # smaller peaks are not enlarged further; the norm's epsilon outweighs them anyway
GATE_SCALE = 16.0  # the value half of a gated layer is stored this much smaller, and the layer after it larger

_HALF_SAFE: contextvars.ContextVar[bool] = contextvars.ContextVar("half_safe", default=False)


@contextlib.contextmanager
def half_safe(on: bool = True) -> Iterator[None]:
    """While tracing in here, norms divide by the largest magnitude before they square.

    Plainly written, a norm squares activations: above 256 the square is no float16 number, the variance becomes
    infinite and the output a constant, without any error.
    """
    token = _HALF_SAFE.set(on)
    try:
        yield
    finally:
        _HALF_SAFE.reset(token)


def _unit_rms(y: Array, axes: tuple[int, ...], eps: float) -> Array:
    """y / sqrt(mean(y²) + eps) over the axes."""
    offset = eps
    if _HALF_SAFE.get():
        peak = jnp.maximum(jnp.abs(y).max(axes, keepdims=True), PEAK_FLOOR)
        y = y * (PEAK / peak)
        offset = (PEAK * eps**0.5) / peak
        offset = offset * offset
    return y * jax.lax.rsqrt((y * y).mean(axes, keepdims=True) + offset)


def _native(name: str, function: Callable[..., Array], *args: Array, **attributes: Any) -> Array:
    if not _MARK_NATIVE.get():
        return function(*args)
    return _single(f"native.{name}", function)(*args, **attributes)


# --- layers


@scoped
def dense(node: Node, x: Array) -> Array:
    """Linear layer over the last axis (FULLY_CONNECTED)."""
    y = jax.lax.dot_general(x, node["kernel"], (((x.ndim - 1,), (1,)), ((), ())))
    return y + node["bias"] if "bias" in node else y


@scoped
def conv(node: Node, x: Array, stride: int = 1) -> Array:
    """Convolution with kernel // 2 of padding on both sides (CONV_2D; DEPTHWISE_CONV_2D in a module "depthwise")."""
    kernel = node["kernel"]
    depthwise = node.name == "depthwise"
    size = kernel.shape[0 if depthwise else 1]
    y = jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((size // 2, size // 2),) * 2,
        dimension_numbers=("NHWC", "HWIO" if depthwise else "OHWI", "NHWC"),
        feature_group_count=x.shape[-1] if depthwise else 1,
    )
    return y + node["bias"] if "bias" in node else y


@scoped
def separable_conv(node: Node, x: Array) -> Array:
    return conv(node.sub("pointwise"), conv(node.sub("depthwise"), x))


@scoped
def group_norm(node: Node, x: Array, groups: int, eps: float) -> Array:
    b, h, w, c = x.shape

    def normalise(x: Array, scale: Array, bias: Array) -> Array:
        y = x.reshape(b, h * w, groups, c // groups)
        y = _unit_rms(y - y.mean((1, 3), keepdims=True), (1, 3), eps)
        return y.reshape(b, h, w, c) * scale + bias

    return _native("group_norm", normalise, x, node["scale"], node["bias"], groups=groups, eps=eps)


@scoped
def layer_norm(node: Node, x: Array, eps: float = blocks.TOKEN_NORM_EPS) -> Array:
    def normalise(x: Array, scale: Array, bias: Array) -> Array:
        return _unit_rms(x - x.mean(-1, keepdims=True), (x.ndim - 1,), eps) * scale + bias

    return _native("layer_norm", normalise, x, node["scale"], node["bias"], eps=eps)


@scoped
def rms_norm(node: Node, x: Array, eps: float = blocks.TOKEN_NORM_EPS) -> Array:
    def normalise(x: Array, scale: Array) -> Array:
        return _unit_rms(x, (x.ndim - 1,), eps) * scale

    return _native("rms_norm", normalise, x, node["scale"], eps=eps)


def silu(x: Array) -> Array:
    return x * jax.nn.sigmoid(x)


def gelu(x: Array) -> Array:
    """Exact GELU as the one op that LiteRT has for it."""
    erf = rational_erf if _WRITTEN_OUT.get() else jax.lax.erf
    return _single("aten.gelu.default", lambda x: blocks.gelu(x, erf))(x, approximate="none")


def embedding_lookup(ids: Array, table: Array) -> Array:
    """Rows (n, d) of a table for int32 ids (n,): EMBEDDING_LOOKUP. A plain gather is GATHER_ND, which GPUs refuse."""

    def rows(ids: Array, table: Array) -> Array:
        return jnp.asarray(table).at[ids].get(mode="promise_in_bounds", wrap_negative_indices=False)

    return _single("odml.embedding_lookup", rows)(ids, table)


def upsample_nearest(x: Array) -> Array:
    """Each pixel becomes a 2x2 block (RESIZE_NEAREST_NEIGHBOR)."""
    size = np.array([2 * x.shape[1], 2 * x.shape[2]], np.int32)
    return _single("tfl.resize_nearest_neighbor", blocks.upsample_nearest)(x, size=size)


def scale_queries(tree: dict[str, Any], name: str, factor: float) -> None:
    """Multiplies `factor` into the weights below `name`, the last that act on queries before their scores.

    In the graph the converter would move the product onto the weights and leave it to be computed in every call.
    """
    for key, value in tree.items():
        if not isinstance(value, Mapping):
            continue
        if key == name:
            tree[key] = {leaf: np.asarray(array) * np.float32(factor) for leaf, array in value.items()}
        else:
            scale_queries(tree[key], name, factor)


def attend(q: Array, k: Array, v: Array, bias: Array | None, chunk: int = 0) -> Array:
    """Softmax attention of scaled rows (…, r, d) over keys (…, m, d), leading axes equal.

    Args:
      bias: added to the scores.
      chunk: rows computed at a time, which bounds the memory of the scores to chunk · m; 0 takes all at once.
    """
    rows, axis = q.shape[-2], q.ndim - 2
    if not 0 < chunk < rows:
        return _attend_rows(q, k, v, bias)
    starts = range(0, rows, chunk)
    parts = [jax.lax.slice_in_dim(q, start, min(start + chunk, rows), axis=axis) for start in starts]
    # Without the barriers litert-converter joins the probabilities and multiplies them with the values at once, so that
    # all of them are in memory after all.
    mixed = [jax.lax.optimization_barrier(_attend_rows(part, k, v, bias)) for part in parts]
    return jnp.concatenate(mixed, axis)


def _attend_rows(q: Array, k: Array, v: Array, bias: Array | None) -> Array:
    batch = tuple(range(q.ndim - 2))
    last = q.ndim - 1
    scores = jax.lax.dot_general(q, k, (((last,), (last,)), (batch, batch)))
    if bias is not None:
        scores = scores + bias
    weights = _native("softmax", functools.partial(jax.nn.softmax, axis=-1), scores)
    return jax.lax.dot_general(weights, v, (((last,), (last - 1,)), (batch, batch)))
