"""Kernels on a mesh: the compiler cannot split one, so each device runs it on its own rows and heads."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
from jaxtyping import Array, Float

from s2d_jax.model.attention_forms.request import Causal, Request
from s2d_jax.sharding import RULES, free_axes, partition_spec


def divides(request: Request) -> bool:
    """Whether rows and key heads divide over the mesh."""
    mesh = request.mesh
    if mesh is None:
        return True
    free = free_axes(mesh)
    rows = math.prod(free.get(axis, 1) for axis in RULES["batch"] or ())
    B, K = request.k_BKSH.shape[:2]
    return B % rows == 0 and K % free.get("tensor", 1) == 0


def over_devices(run: Callable[..., jax.Array], request: Request) -> Float[Array, "B T N H"]:
    """What `run(q, k, v, segment_ids)` gives for the rows and heads of each device."""
    assert isinstance(request.looks, Causal)
    arrays = (request.q_BTNH, request.k_BKSH, request.v_BKSH, request.looks.segment_ids_BT)
    if request.mesh is None:
        return run(*arrays)
    heads = partition_spec(("batch", "length", "heads"))
    specs = (heads, partition_spec(("batch", "kv_heads")), partition_spec(("batch", "kv_heads")))
    split = jax.shard_map(
        run,
        mesh=request.mesh,
        axis_names=set(free_axes(request.mesh)),
        in_specs=(*specs, partition_spec(("batch",))),
        out_specs=heads,
        check_vma=False,  # kernels do not say over which axes their results vary
    )
    return split(*arrays)
