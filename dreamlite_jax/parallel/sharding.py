"""Mesh (data, fsdp) and where state and batches live on it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dreamlite_jax.errors import UserError
from dreamlite_jax.parallel.config import MeshConfig

MIN_SHARDED_SIZE = 2**16  # smaller arrays are replicated: gathering them costs more than keeping them
AXES = ("data", "fsdp")


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """Mesh over all devices. Axis types are Auto: with Explicit a convolution with sharded output channels fails.

    On TPUs neighbours on the torus are neighbours on fsdp, and slices lie along data: what crosses the data centre's
    network is the sum of gradients alone.

    Raises:
      UserError: the devices do not fill the mesh, or fsdp would cross slices.
    """
    devices = list(jax.devices() if devices is None else np.asarray(devices).flat)
    data = config.data or max(1, len(devices) // config.fsdp)
    if data * config.fsdp != len(devices):
        raise UserError(
            f"mesh data={data} x fsdp={config.fsdp} needs {data * config.fsdp} devices; this run has {len(devices)}"
        )
    return Mesh(_arrange(devices, data, config.fsdp), AXES, axis_types=(AxisType.Auto,) * 2)


def _arrange(devices: list[Any], data: int, fsdp: int) -> np.ndarray:
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(data, fsdp)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if data % slices:
        raise UserError(f"mesh data={data} must be a multiple of the {slices} slices; lower config.mesh.fsdp")
    if slices == 1:
        return mesh_utils.create_device_mesh((data, fsdp), devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(
        (data // slices, fsdp), (slices, 1), devices, allow_split_physical_axes=True
    )


def local_mesh() -> Mesh:
    """This process's first device alone, for what one process does by itself."""
    return Mesh(np.asarray(jax.local_devices()[:1]).reshape(1, 1), AXES, axis_types=(AxisType.Auto,) * 2)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over all devices."""
    return NamedSharding(mesh, P(AXES))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def state_sharding(mesh: Mesh | AbstractMesh, state):
    """Large arrays split over fsdp along their longest divisible axis (ZeRO); the rest replicated."""
    fsdp = mesh.shape["fsdp"]

    def place(x) -> NamedSharding:
        axes = [(size, axis) for axis, size in enumerate(x.shape) if size % fsdp == 0]
        if fsdp == 1 or x.size < MIN_SHARDED_SIZE or not axes:
            return replicated(mesh)
        spec: list[str | None] = [None] * len(x.shape)
        spec[max(axes)[1]] = "fsdp"
        return NamedSharding(mesh, P(*spec))

    return jax.tree.map(place, state)


def global_batch(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """This host's part of a batch as global arrays."""
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}


# --- inside a step: the mesh is that of `jax.set_mesh`, so that a stage need not be told of it


def activations() -> NamedSharding | None:
    """What pins activations to their part of the batch; None where there is one device or no mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return None
    return NamedSharding(mesh, P(tuple(axis for axis in AXES if axis not in mesh.manual_axes)))


def like_state(tree: Any) -> Any:
    """Arrays constrained to where the state keeps its like: sums of gradients become reduce-scatters under ZeRO."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return tree
    return jax.lax.with_sharding_constraint(tree, state_sharding(mesh, tree))


def owned(grads: Any, params: Any) -> Any:
    """Gradients of `gathered` parameters, where the state keeps these and in their dtype."""
    return jax.tree.map(lambda g, p: g.astype(p.dtype), like_state(grads), params)


def gathered(params: Any, dtype: Any = None) -> Any:
    """Parameters whole on every device; those that are split over fsdp are gathered, once and in `dtype` (or theirs).

    Left to itself the partitioner splits matrix products over fsdp instead, and moves activations for it (all-to-all).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1:
        return params

    def whole(x: jax.Array, placement: NamedSharding) -> jax.Array:
        if placement.spec == P():
            return x
        x = x if dtype is None else x.astype(dtype)  # cast first: half the bytes to send
        x = jax.lax.with_sharding_constraint(x, placement)
        return jax.lax.with_sharding_constraint(x, replicated(mesh))

    return jax.tree.map(whole, params, state_sharding(mesh, params))


def microbatches(tree: Any, count: int) -> Any:
    """(b, …) leaves as (count, b / count, …), each microbatch over all devices.

    Microbatch j has the rows i with i mod count = j: so a device's rows stay where they are.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
        if mesh.empty or mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(None, AXES)))

    return jax.tree.map(split, tree)


def mean_over_data(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(tree, rows)`, means over its rows, computed for each place along `data` by itself and averaged once.

    Left to itself the partitioner would average every sum that `function` makes on its way; along `data` lie the slices
    of a pod, with a data centre's network between them. `rows` are those of `microbatches`; results are placed as
    `like_state` places them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["data"] == 1:
        return function

    def apart(tree: Any, rows: Any) -> Any:
        return jax.tree.map(lambda x: x[None], function(tree, rows))

    def averaged(tree: Any, rows: Any) -> Any:
        split = jax.shard_map(
            apart, in_specs=(P(), P(None, "data")), out_specs=P("data"), axis_names={"data"}, check_vma=False
        )
        leaves, structure = jax.tree.flatten(split(tree, rows))
        specs = [state_sharding(mesh, jax.ShapeDtypeStruct(x.shape[1:], x.dtype)).spec for x in leaves]
        average = jax.shard_map(
            _mean_of_blocks, in_specs=tuple(P("data", *spec) for spec in specs), out_specs=specs, check_vma=False
        )
        return structure.unflatten(average(*leaves))

    return averaged


def _mean_of_blocks(*blocks: jax.Array) -> list[jax.Array]:
    """What one device has of each array, averaged over `data` in one piece: a TPU has few flags for transfers."""
    whole = jax.lax.pmean(jnp.concatenate([block.ravel() for block in blocks]), "data")
    ends = np.cumsum([block.size for block in blocks])
    return [whole[end - block.size : end].reshape(block.shape[1:]) for block, end in zip(blocks, ends, strict=True)]


# --- outside: state made where it belongs, and brought together


def born(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, compiled, its arrays made where `state_sharding` of the current mesh puts them."""
    try:
        mesh = jax.sharding.get_mesh()
    except ValueError:  # a program is being traced, for its shapes: nothing is made
        return function(*args)
    if mesh.empty:
        return jax.jit(function)(*args)
    placement = state_sharding(mesh, jax.eval_shape(function, *args))
    return jax.jit(function, out_shardings=placement)(*args)


def place(tree: Any, placement: Any) -> Any:
    """Arrays moved to their shardings. Host arrays must be the same in every process."""

    def move(x: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(x, jax.Array) and (sharding.is_fully_addressable or not x.is_fully_addressable):
            return jax.device_put(x, sharding)
        return jax.make_array_from_callback(np.shape(x), sharding, lambda index: np.asarray(x)[index])

    return jax.tree.map(move, tree, placement)


def gather(tree: Any, mesh: Mesh) -> Any:
    """Sharded arrays as whole ones on this process's first device. Every process must call it."""
    if mesh.size == 1:
        return tree
    return jax.tree.map(lambda x: x.addressable_data(0), _gathering(mesh)(tree))


@functools.cache
def _gathering(mesh: Mesh) -> Callable[[Any], Any]:
    """Compiled once: grids ask for it again and again."""
    return jax.jit(lambda x: x, out_shardings=replicated(mesh))
