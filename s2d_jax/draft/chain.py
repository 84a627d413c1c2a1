"""Drafting a chain, token by token: the loop that every chain drafter shares, and how one token is chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from s2d_jax.draft.drafter import Proposal
from s2d_jax.draft.length import confidence, decide
from s2d_jax.draft.logits import num_entries, over_all_ids, token_ids
from s2d_jax.draft.request import Request, is_stop
from s2d_jax.model.kv_cache import write_window
from s2d_jax.sampling import fold_in, probabilities, sample

# step(state, tokens_BC, end_B, live_B) -> (f32 logits after the first end_B tokens, index of the exit, state)
Step = Callable[
    [Any, Int[Array, "B C"], Int[Array, "B"], Bool[Array, "B"]],
    tuple[Float[Array, "B U"], Int[Array, "B"], Any],
]


@dataclasses.dataclass(frozen=True)
class ChainConfig:
    """What is compiled into a chain drafter.

    Attributes:
        width: G, the most tokens drafted in a round.
        vocab_size: V, the target's; draft logits are cut or padded to it.
        greedy: every row has temperature 0.
        sampled: draw drafted tokens from q; else draft the mode, with a one-hot q.
        watched: a chain may end early by its confidences.
    """

    width: int
    vocab_size: int
    greedy: bool
    sampled: bool
    watched: bool = False


def propose_chain(
    config: ChainConfig,
    step: Step,
    state: Any,
    tokens_BC: Int[Array, "B C"],
    length_B: Int[Array, "B"],
    num_draft_B: Int[Array, "B"],
    key_B: Key[Array, "B"],
    request: Request,
) -> tuple[Proposal, Any]:
    """Drafts until every row has `num_draft_B` tokens, or has drafted one of its stop tokens, or its rule ends the chain.

    Whether a row goes on depends on tokens that were already drafted and on q vectors, never on the probability of a token that
    would be dropped, so the target's distribution is kept.
    """
    B, G = tokens_BC.shape[0], config.width
    keep_probs = config.sampled and not config.greedy
    # In the loop the q of each token has the draft's own U entries.
    U = num_entries(config.vocab_size, request)
    probs_BGU = jnp.zeros((B, G, U), jnp.float32) if keep_probs else None
    nothing_BG = jnp.zeros((B, G), jnp.int32)
    proposal = Proposal(nothing_BG, jnp.zeros(B, jnp.int32), probs_BGU, nothing_BG)

    def draft_one(carry):
        i, live_B, hope_B, tokens_BC, proposal, state = carry
        logits_BU, exit_B, state = step(state, tokens_BC, length_B + i, live_B)
        more_B = i + 1 < num_draft_B
        if config.watched:
            sure_B = confidence(logits_BU)
            draw_B, goes_on_B, hope_B = decide(
                request.drafting, i, hope_B, sure_B, exit_B, num_draft_B
            )
            live_B, more_B = live_B & draw_B, more_B & goes_on_B
        index_B, probs_BU = _choose(config, logits_BU, request, fold_in(key_B, length_B + i))
        token_B = token_ids(index_B, request)
        tokens_BC = write_window(tokens_BC, token_B[:, None], length_B + i, axis=1)
        proposal = _append(proposal, i, token_B, exit_B, probs_BU, live_B)
        live_B = live_B & more_B & ~is_stop(token_B, request.stop_ids_BZ)
        return i + 1, live_B, hope_B, tokens_BC, proposal, state

    def unfinished(carry):
        return jnp.any(carry[1])

    hope_B = jnp.ones(B, jnp.float32)
    start = (jnp.int32(0), num_draft_B > 0, hope_B, tokens_BC, proposal, state)
    *_, proposal, state = jax.lax.while_loop(unfinished, draft_one, start)
    probs_BGU = proposal.draft_probs_BGV
    if probs_BGU is not None:  # once per round: it is as large as the target's vocabulary
        probs_BGV = over_all_ids(probs_BGU, request.vocabulary_U, config.vocab_size)
        proposal = proposal.replace(draft_probs_BGV=probs_BGV)
    return proposal, state


def _choose(config: ChainConfig, logits_BU, request: Request, key_B):
    """The entry `[B]` of the next drafted token, and the q it was drawn from (None when it is the mode)."""
    if config.greedy or not config.sampled:
        return jnp.argmax(logits_BU, axis=-1).astype(jnp.int32), None
    probs_BU = probabilities(logits_BU[:, None], request.sampling)[:, 0]
    return sample(probs_BU, key_B), probs_BU


def _append(proposal: Proposal, i, token_B, exit_B, probs_BU, live_B) -> Proposal:
    """Writes the token of step `i` (a row that is not live keeps its count, so its entry means nothing)."""
    put = jax.lax.dynamic_update_slice_in_dim
    probs_BGU = proposal.draft_probs_BGV
    if probs_BGU is not None:
        probs_BGU = put(probs_BGU, probs_BU[:, None], i, 1)
        proposal = proposal.replace(draft_probs_BGV=probs_BGU)
    return proposal.replace(
        tokens_BG=put(proposal.tokens_BG, token_B[:, None], i, 1),
        exit_BG=put(proposal.exit_BG, exit_B[:, None], i, 1),
        num_draft_B=proposal.num_draft_B + live_B.astype(jnp.int32),
    )
