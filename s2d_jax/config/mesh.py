"""How a computation is spread over devices."""

from __future__ import annotations

import dataclasses
import math

from s2d_jax.config.plain import plain_fields
from s2d_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")
# More than the largest pods and their slices have together.
MOST_DEVICES = 2**16


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices each mesh axis has; their product is the number of devices used."""

    data: int = 1
    """Copies of the parameters; each takes its share of the rows."""
    fsdp: int = 1
    """Devices that share one copy of the parameters, and split the rows too."""
    tensor: int = 1
    """Devices that split the heads, hidden units and vocabulary of one row."""
    slices: int | None = None
    """Groups of devices with a fast network of their own (TPU slices); the data axis lies over the slow one between them.
    1 ignores slices; without a number the devices tell how many there are."""

    def __post_init__(self):
        plain_fields(self, "mesh.")
        for axis in (*MESH_AXES, "slices"):
            size = getattr(self, axis)
            if size is not None and size < 1:
                raise UserError(f"mesh.{axis}={size} must be at least 1")
        if (count := math.prod(self.shape)) > MOST_DEVICES:
            raise UserError(
                f"mesh {'x'.join(map(str, self.shape))} is {count} devices; a mesh has {MOST_DEVICES} at most"
            )
        if self.slices is not None:
            self.check_slices(self.slices)

    def check_slices(self, slices: int) -> None:
        """Raises UserError unless each slice holds a whole number of steps along the data axis."""
        if self.data % slices:
            raise UserError(
                f"mesh.data={self.data} does not divide over {slices} slices; choose a multiple of {slices}, "
                "or mesh.slices 1 to ignore slices"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Devices along (data, fsdp, tensor)."""
        return (self.data, self.fsdp, self.tensor)
