"""Mesh (data, fsdp) and where state and batches live on it."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dreamlite_jax.errors import UserError
from dreamlite_jax.training.config import MeshConfig

MIN_SHARDED_SIZE = 2**16  # smaller arrays are replicated: gathering them costs more than keeping them


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """Mesh over all devices. Axis types are Auto: with Explicit a convolution with sharded output channels fails."""
    devices = np.asarray(jax.devices() if devices is None else devices)
    data = config.data or devices.size // config.fsdp
    if data * config.fsdp != devices.size:
        raise UserError(
            f"mesh data={data} x fsdp={config.fsdp} needs {data * config.fsdp} devices; this run has {devices.size}"
        )
    return Mesh(devices.reshape(data, config.fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over all devices."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def state_sharding(mesh: Mesh, state):
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
