"""Where the arrays of a call lie: beside the target's parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from s2d_jax.sharding import mesh_of, replicated


@dataclasses.dataclass(frozen=True)
class Placement:
    """Replicates arrays over a mesh.

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

    def put(self, tree: Any) -> Any:
        """The arrays of `tree`, replicated."""
        if self.mesh is None:
            return tree
        everywhere = replicated(self.mesh)
        if self.abstract:
            return jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), tree
            )
        return jax.device_put(tree, everywhere)
