"""Control flow that keeps caches in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

Carry = TypeVar("Carry")


def run_if(predicate: Bool[Array, ""], body: Callable[[Carry], Carry], carry: Carry) -> Carry:
    """Applies `body` to `carry` if `predicate` is true.

    A `while_loop` of at most one trip: `lax.cond` would copy the caches that it carries.
    """

    def once(state):
        return jnp.bool_(False), body(state[1])

    return jax.lax.while_loop(lambda state: state[0], once, (predicate, carry))[1]


def at_width(
    widths: Sequence[int],
    needed: Int[Array, ""],
    body: Callable[[int, Carry], Carry],
    carry: Carry,
) -> Carry:
    """Applies `body(width, carry)` with the smallest of the static, ascending `widths` that is at least `needed`."""
    if len(widths) == 1:
        return body(widths[0], carry)
    for below, width in zip((-1, *widths), widths, strict=False):
        chosen = (needed > below) & (needed <= width)
        carry = run_if(chosen, lambda carry, width=width: body(width, carry), carry)
    return carry
