"""What a drafter returns, and what it is asked with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from s2d_jax.config import SamplingParams


@flax.struct.dataclass
class SamplingArrays:
    """`SamplingParams` of every row, as arrays, so that changing them compiles nothing.

    Attributes:
        temperature_B: f32; 0 is greedy.
        top_k_B: int32; 0 is off.
        top_p_B: f32; 1 is off.
        min_p_B: f32; 0 is off.
    """

    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    min_p_B: jax.Array

    @classmethod
    def stack(cls, params: Sequence[SamplingParams]) -> SamplingArrays:
        """The parameters of a batch, one row each."""

        def column(name, dtype):
            return jnp.asarray(np.array([getattr(p, name) for p in params], dtype))

        return cls(
            temperature_B=column("temperature", np.float32),
            top_k_B=column("top_k", np.int32),
            top_p_B=column("top_p", np.float32),
            min_p_B=column("min_p", np.float32),
        )


@flax.struct.dataclass
class Request:
    """What one call asks for, per row. Arrays only: nothing here compiles anything anew.

    Attributes:
        sampling: temperature and filters.
        key_B: one random key per row.
        max_length_B: int32, prompt plus new tokens at most.
        stop_ids_BN: int32, token ids that end a row; -1 where there are fewer.
        exit_threshold_E: f32, one per exit in use.
    """

    sampling: SamplingArrays
    key_B: jax.Array
    max_length_B: jax.Array
    stop_ids_BN: jax.Array
    exit_threshold_E: jax.Array


@flax.struct.dataclass
class Proposal:
    """A drafted chain per row.

    Attributes:
        tokens_BG: int32; entries at or beyond `num_draft_B` mean nothing.
        num_draft_B: int32, drafted tokens of each row, 0..G.
        draft_probs_BGV: f32, the distribution that each token was drawn from; None when tokens are not drawn, but are
            certain given what came before (q is one-hot).
    """

    tokens_BG: jax.Array
    num_draft_B: jax.Array
    draft_probs_BGV: jax.Array | None


class Drafter(Protocol):
    """One way of drafting. Its state is a pytree that only it understands."""

    @property
    def width(self) -> int:
        """G, the most tokens that it drafts in a round; 0 for none."""
        ...

    @property
    def margin(self) -> int:
        """How many positions beyond a row's length it may write to."""
        ...

    def init(self, params: Any, tokens_BC: jax.Array, length_B: jax.Array, prompt_width: int):
        """The state after the prompts `tokens_BC[:, :prompt_width]`, of which `length_B` are real."""
        ...

    def propose(
        self, params: Any, state, tokens_BC, length_B, num_draft_B, key_B, request: Request
    ) -> tuple[Proposal, Any]:
        """Drafts up to `num_draft_B` tokens after the first `length_B` of `tokens_BC`."""
        ...

    def rewind(self, state, length_B: jax.Array):
        """Forgets all but the first `length_B` positions of each row."""
        ...

    def stats(self, state) -> dict[str, jax.Array]:
        """Counters of this drafter, each `[B, ...]`."""
        ...


def is_stop(tokens: jax.Array, stop_ids_BN: jax.Array) -> jax.Array:
    """bool, like `tokens` (`[B]` or `[B, T]`): whether each is one of its row's stop tokens."""
    stops = stop_ids_BN if tokens.ndim == 1 else stop_ids_BN[:, None, :]
    return (tokens[..., None] == stops).any(axis=-1)
