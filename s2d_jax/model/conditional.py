"""Control flow that keeps caches in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

Carry = TypeVar("Carry")
Result = TypeVar("Result")


def run_if(predicate: Bool[Array, ""], body: Callable[[Carry], Carry], carry: Carry) -> Carry:
    """Applies `body` to `carry` if `predicate` is true.

    A `while_loop` of at most one trip: `lax.cond` would copy the caches that it carries, on every backend. Where nothing
    large is carried, `lax.cond` is right.
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
    """Applies `body(width, carry)` with the smallest of the static, ascending `widths` that is at least `needed`.

    Caches that are carried stay in place.
    """
    if len(widths) == 1:
        return body(widths[0], carry)
    for below, width in zip((-1, *widths), widths, strict=False):
        chosen = (needed > below) & (needed <= width)
        carry = run_if(chosen, lambda carry, width=width: body(width, carry), carry)
    return carry


def of_width(
    widths: Sequence[int], needed: Int[Array, ""], body: Callable[[int], Result]
) -> Result:
    """What `body(width)` returns for the smallest of the static, ascending `widths` that is at least `needed`."""
    index = jnp.sum(jnp.asarray(widths[:-1], jnp.int32) < needed)
    return jax.lax.switch(index, [lambda width=width: body(width) for width in widths])
