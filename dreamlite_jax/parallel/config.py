"""How a run is spread over devices."""

import dataclasses

from dreamlite_jax.config import check_bounds


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along (data, fsdp); data 0 means all that fsdp leaves."""

    data: int = 0
    fsdp: int = 1

    def __post_init__(self):
        check_bounds(self, ("fsdp",), least=1)
        check_bounds(self, ("data",), least=0)
