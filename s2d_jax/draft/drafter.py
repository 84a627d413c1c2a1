"""What a drafter is: the protocol that the decode loop asks, and the proposal that it gets."""

from __future__ import annotations

from typing import Any, Protocol

import flax.struct
import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key

from s2d_jax.draft.request import Request


class Proposal(flax.struct.PyTreeNode):
    """A drafted chain per row.

    Attributes:
        tokens_BG: int32; entries at or beyond `num_draft_B` mean nothing.
        num_draft_B: int32, drafted tokens of each row, 0..G.
        draft_probs_BGV: f32, the distribution that each token was drawn from; None when tokens are not drawn, but are
            certain given what came before (q is one-hot).
        exit_BG: int32, index of the exit that drafted each token.
    """

    tokens_BG: jax.Array
    num_draft_B: jax.Array
    draft_probs_BGV: jax.Array | None
    exit_BG: jax.Array

    def first(self, count: int) -> Proposal:
        """Only the first `count` drafted positions; no row has more."""
        probs_BGV = None if self.draft_probs_BGV is None else self.draft_probs_BGV[:, :count]
        return self.replace(
            tokens_BG=self.tokens_BG[:, :count],
            draft_probs_BGV=probs_BGV,
            exit_BG=self.exit_BG[:, :count],
        )


# The target's states by name, valid at the positions that it has computed: all but the last token's.
# Beyond these they are garbage, like the entries of a cache.
TargetStates = dict[str, Float[Array, "B C D"]]

# A drafter's counters by name: arrays, or NumPy arrays once the host has them.
Counters = dict[str, Int[Array | np.ndarray, "..."]]


class Drafter(Protocol):
    """One way of drafting. Its state is a pytree that only it understands.

    `seen`, where a method has it, holds the target's states that `target_states` names.
    """

    @property
    def target_states(self) -> tuple[str, ...]:
        """Which states of the target it wants to see at every position; () for none.

        "final_norm" is the state after the final norm, "input_3" the input of layer 3 (counted from 0), and so on.
        """
        ...

    @property
    def width(self) -> int:
        """G, the most tokens that it drafts in a round; 0 for none."""
        ...

    @property
    def margin(self) -> int:
        """How many positions beyond a row's length it may write to."""
        ...

    def init(
        self,
        params: Any,
        tokens_BC: Int[Array, "B C"],
        length_B: Int[Array, "B"],
        prompt_width: int,
        seen: TargetStates,
    ) -> Any:
        """The state after the first `length_B` of `tokens_BC`, computed `prompt_width` (static) at a time."""
        ...

    def extend(
        self,
        params: Any,
        state: Any,
        tokens_BC: Int[Array, "B C"],
        length_B: Int[Array, "B"],
        width: int,
        seen: TargetStates,
    ) -> Any:
        """The state after the first `length_B` of `tokens_BC`, of which `state` holds some; counters start again at 0."""
        ...

    def grow(self, state: Any, capacity: int) -> Any:
        """The same state with room for `capacity` positions in each row."""
        ...

    def propose(
        self,
        params: Any,
        state: Any,
        tokens_BC: Int[Array, "B C"],
        length_B: Int[Array, "B"],
        num_draft_B: Int[Array, "B"],
        key_B: Key[Array, "B"],
        request: Request,
        seen: TargetStates,
    ) -> tuple[Any, Any]:
        """Drafts up to `num_draft_B` tokens after the first `length_B` of `tokens_BC`."""
        ...

    def rewind(self, state: Any, length_B: Int[Array, "B"]) -> Any:
        """Forgets all but the first `length_B` positions of each row."""
        ...

    def stats(self, state: Any) -> Counters:
        """Counters of this drafter."""
        ...
