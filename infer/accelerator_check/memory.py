"""How a device says that something does not fit."""

from __future__ import annotations

import jax


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of JAX says that a device's memory did not suffice, at compiling or at running."""
    told = str(error)
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in told
