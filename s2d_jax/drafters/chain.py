"""Drafting a chain, token by token: the loop that every chain drafter shares, and how one token is chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from s2d_jax.draft_length import confidence, decide
from s2d_jax.kv_cache import write_window
from s2d_jax.proposal import Proposal, Request, is_stop
from s2d_jax.sampling import fold_in, probabilities, sample

# step(state, tokens_BC, end_B, live_B) -> (f32 logits [B, V] after the first end_B tokens, int32 [B] index of the exit, state)
Step = Callable[[Any, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class ChainConfig:
    """What is compiled into a chain drafter.

    Attributes:
        width: G, the most tokens drafted in a round.
        vocab_size: of the target; draft logits are cut or padded to it.
        greedy: every row has temperature 0.
        sampled: draw drafted tokens from q; else draft the mode, with a one-hot q.
        watched: a chain may end early by its confidences.
    """

    width: int
    vocab_size: int
    greedy: bool
    sampled: bool
    watched: bool = False


def fit_vocabulary(logits_BV: jax.Array, vocab_size: int) -> jax.Array:
    """Cuts logits to `vocab_size`, or gives ids the draft lacks no probability: models pad their tables differently."""
    missing = vocab_size - logits_BV.shape[-1]
    if missing > 0:
        return jnp.pad(logits_BV, ((0, 0), (0, missing)), constant_values=-jnp.inf)
    return logits_BV[:, :vocab_size]


def propose_chain(
    config: ChainConfig,
    step: Step,
    state,
    tokens_BC,
    length_B,
    num_draft_B,
    key_B,
    request: Request,
) -> tuple[Proposal, Any]:
    """Drafts until every row has `num_draft_B` tokens, or has drafted one of its stop tokens, or its rule ends the chain.

    Whether a row goes on depends on tokens that were already drafted and on q vectors, never on the probability of a token that
    would be dropped, so the target's distribution is kept.
    """
    B, G = tokens_BC.shape[0], config.width
    keep_probs = config.sampled and not config.greedy
    probs_BGV = jnp.zeros((B, G, config.vocab_size), jnp.float32) if keep_probs else None
    proposal = Proposal(jnp.zeros((B, G), jnp.int32), jnp.zeros(B, jnp.int32), probs_BGV)

    def draft_one(carry):
        i, live_B, hope_B, tokens_BC, proposal, state = carry
        logits_BV, exit_B, state = step(state, tokens_BC, length_B + i, live_B)
        more_B = i + 1 < num_draft_B
        if config.watched:
            sure_B = confidence(logits_BV)
            draw_B, goes_on_B, hope_B = decide(
                request.drafting, i, hope_B, sure_B, exit_B, num_draft_B
            )
            live_B, more_B = live_B & draw_B, more_B & goes_on_B
        token_B, probs_BV = _choose(config, logits_BV, request, fold_in(key_B, length_B + i))
        tokens_BC = write_window(tokens_BC, token_B[:, None], length_B + i, axis=1)
        proposal = _append(proposal, i, token_B, probs_BV, live_B)
        live_B = live_B & more_B & ~is_stop(token_B, request.stop_ids_BN)
        return i + 1, live_B, hope_B, tokens_BC, proposal, state

    def unfinished(carry):
        return jnp.any(carry[1])

    hope_B = jnp.ones(B, jnp.float32)
    start = (jnp.int32(0), num_draft_B > 0, hope_B, tokens_BC, proposal, state)
    *_, proposal, state = jax.lax.while_loop(unfinished, draft_one, start)
    return proposal, state


def _choose(config: ChainConfig, logits_BV, request: Request, key_B):
    """The next drafted token `[B]`, and the q it was drawn from (None when it is the mode)."""
    if config.greedy or not config.sampled:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), None
    probs_BV = probabilities(logits_BV[:, None], request.sampling)[:, 0]
    return sample(probs_BV, key_B), probs_BV


def _append(proposal: Proposal, i, token_B, probs_BV, live_B) -> Proposal:
    """Writes the token of step `i` (a row that is not live keeps its count, so its entry means nothing)."""
    put = jax.lax.dynamic_update_slice_in_dim
    if probs_BV is not None:
        probs_BGV = put(proposal.draft_probs_BGV, probs_BV[:, None], i, 1)
        proposal = proposal.replace(draft_probs_BGV=probs_BGV)
    return proposal.replace(
        tokens_BG=put(proposal.tokens_BG, token_B[:, None], i, 1),
        num_draft_B=proposal.num_draft_B + live_B.astype(jnp.int32),
    )
