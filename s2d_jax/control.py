"""Control flow that keeps caches in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

Carry = TypeVar("Carry")


def run_if(predicate: jax.Array, body: Callable[[Carry], Carry], carry: Carry) -> Carry:
    """Applies `body` to `carry` if the scalar `predicate` is true.

    A `while_loop` of at most one trip: `lax.cond` would copy the caches that it carries.
    """

    def once(state):
        return jnp.bool_(False), body(state[1])

    return jax.lax.while_loop(lambda state: state[0], once, (predicate, carry))[1]
