"""Where the arrays of a call lie: beside the target's parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from s2d_jax.decode.row_groups import WHOLE, groups_of, specs_of
from s2d_jax.sharding import mesh_of, put_whole


@dataclasses.dataclass(frozen=True)
class Placement:
    """Puts the arguments of programs on a mesh: rows over its data axis, anything else on every device.

    Attributes:
        mesh: the mesh of the target's parameters; None leaves arrays where they are.
        abstract: the parameters are shapes only (ahead-of-time compilation), so arrays become shapes too.
    """

    mesh: Mesh | None
    abstract: bool = False

    @classmethod
    def beside(cls, params: Any) -> Placement:
        """The placement beside a target's parameters."""
        first = jax.tree.leaves(params)[0]
        return cls(mesh_of(params), isinstance(first, jax.ShapeDtypeStruct))

    def padding(self, rows: int) -> int:
        """How many rows make the batch divide over the mesh."""
        return -rows % groups_of(self.mesh)

    def put(self, argument: Any) -> Any:
        """An argument of a program, split as `row_groups.specs_of` says."""
        return self._put(argument, specs_of(argument))

    def put_draft(self, params: Any) -> Any:
        """The parameters of a draft, whole on every device, unless they are split over this very mesh."""
        return params if mesh_of(params) == self.mesh else self._put(params, WHOLE)

    def _put(self, tree: Any, specs: Any) -> Any:
        mesh = self.mesh
        if mesh is None:
            return tree
        is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)
        if self.abstract:
            each = jax.tree.broadcast(shardings, tree)
            return jax.tree.map(
                lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
                *(tree, each),
            )
        return jax.tree.map(put_whole, tree, jax.tree.broadcast(shardings, tree))
