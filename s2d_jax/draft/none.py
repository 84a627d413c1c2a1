"""No drafting: the autoregressive baseline, on the same engine."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from s2d_jax.draft.drafter import Counters, Proposal, TargetStates
from s2d_jax.draft.request import Request


@dataclasses.dataclass(frozen=True)
class NoDrafter:
    """Proposes nothing; with `width` G, the target still computes G + 1 positions.

    That is the width-matched reference: the last bits of a product depend on its number of rows, so greedy output is
    compared with plain decoding of the same width.
    """

    width: int = 0

    @property
    def target_states(self) -> tuple[str, ...]:
        return ()

    @property
    def margin(self) -> int:
        return 0

    def init(
        self,
        params: Any,
        tokens_BC: Int[Array, "B C"],
        length_B: Int[Array, "B"],
        prompt_width: int,
        seen: TargetStates,
    ) -> tuple[()]:
        return ()

    def extend(
        self,
        params: Any,
        state: tuple[()],
        tokens_BC: Int[Array, "B C"],
        length_B: Int[Array, "B"],
        width: int,
        seen: TargetStates,
    ) -> tuple[()]:
        return state

    def grow(self, state: tuple[()], capacity: int) -> tuple[()]:
        return state

    def propose(
        self,
        params: Any,
        state: tuple[()],
        tokens_BC: Int[Array, "B C"],
        length_B: Int[Array, "B"],
        num_draft_B: Int[Array, "B"],
        key_B: Key[Array, "B"],
        request: Request,
        seen: TargetStates,
    ) -> tuple[Proposal, tuple[()]]:
        tokens_BG = jnp.zeros((tokens_BC.shape[0], self.width), jnp.int32)
        return Proposal(tokens_BG, jnp.zeros_like(num_draft_B), None, tokens_BG), state

    def rewind(self, state: tuple[()], length_B: Int[Array, "B"]) -> tuple[()]:
        return state

    def stats(self, state: tuple[()]) -> Counters:
        return {}
