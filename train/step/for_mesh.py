"""Steps in the forms of the devices that they are compiled for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from s2d_jax.backends import compiling_for, platform_of


def for_mesh(step: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """`step`, traced in the forms of the mesh's devices, which may be chips that this machine lacks."""

    @functools.wraps(step)
    def traced(*arguments: Any) -> Any:
        with compiling_for(platform_of(mesh)):
            return step(*arguments)

    return traced
