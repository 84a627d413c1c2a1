"""No drafting: the autoregressive baseline, on the same engine."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from s2d_jax.draft.drafter import Proposal


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

    def init(self, params, tokens_BC, length_B, prompt_width, seen):
        return ()

    def extend(self, params, state, tokens_BC, length_B, width, seen):
        return state

    def grow(self, state, capacity):
        return state

    def propose(self, params, state, tokens_BC, length_B, num_draft_B, key_B, request, seen):
        tokens_BG = jnp.zeros((tokens_BC.shape[0], self.width), jnp.int32)
        return Proposal(tokens_BG, jnp.zeros_like(num_draft_B), None), state

    def rewind(self, state, length_B):
        return state

    def stats(self, state):
        return {}
