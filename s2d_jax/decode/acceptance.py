"""Which drafted tokens of a chain are accepted, and what is emitted after them. Arrays in, arrays out, no model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from s2d_jax.draft.drafter import Proposal
from s2d_jax.sampling import one_hot, sample, split, uniform


def leading(accept_BG: Bool[Array, "B G"], num_draft_B: Int[Array, "B"]) -> Int[Array, "B"]:
    """int32 `[B]`: how many drafted tokens are accepted before the first that is not."""
    index_G = jnp.arange(accept_BG.shape[1], dtype=jnp.int32)
    usable_BG = accept_BG & (index_G[None, :] < num_draft_B[:, None])
    return jnp.sum(jnp.cumprod(usable_BG.astype(jnp.int32), axis=1), axis=1)


def accept_greedy(
    proposal: Proposal, logits_BTV: Float[Array, "B T V"]
) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """Accepts the longest drafted prefix that equals the target's argmax.

    Args:
        proposal: G drafted tokens per row.
        logits_BTV: f32 `[B, T, V]`, T >= G + 1; position i follows i drafted tokens.

    Returns:
        `num_accepted_B`, and `next_token_B`, the target's own next token; int32 `[B]`.
    """
    G = proposal.tokens_BG.shape[1]
    choice_BT = jnp.argmax(logits_BTV, axis=-1).astype(jnp.int32)
    num_accepted_B = leading(proposal.tokens_BG == choice_BT[:, :G], proposal.num_draft_B)
    return num_accepted_B, jnp.take_along_axis(choice_BT, num_accepted_B[:, None], axis=1)[:, 0]


def accept_sampled(
    proposal: Proposal, target_probs_BTV: Float[Array, "B T V"], key_B: Key[Array, "B"]
) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """Speculative sampling (Leviathan et al. 2022, algorithm 1): what is emitted follows the target's distribution.

    Token x is accepted with probability `min(1, p(x) / q(x))`. After a rejection the next token is drawn from the residual
    `norm(max(p - q, 0))`; without one, the bonus token is drawn from p. A token that was not drawn has a one-hot q: it is
    accepted with probability p(x), and the residual is p without x.

    Args:
        proposal: G drafted tokens per row, and the q of each.
        target_probs_BTV: f32 `[B, T, V]`, T >= G + 1, the p after temperature and filters.
        key_B: one random key per row.

    Returns:
        `num_accepted_B` and `next_token_B`, int32 `[B]`.
    """
    B, G = proposal.tokens_BG.shape
    V = target_probs_BTV.shape[-1]
    test_key_B, next_key_B = split(key_B, 2)
    if G == 0:
        return jnp.zeros(B, jnp.int32), sample(target_probs_BTV[:, 0], next_key_B)

    def of_drafted(probs_BGV):
        return jnp.take_along_axis(probs_BGV, proposal.tokens_BG[:, :, None], axis=2)[:, :, 0]

    target_prob_BG = of_drafted(target_probs_BTV[:, :G])
    draft_probs_BGV = proposal.draft_probs_BGV
    draft_prob_BG = 1.0 if draft_probs_BGV is None else of_drafted(draft_probs_BGV)
    u_BG = uniform(test_key_B, G)
    accept_BG = u_BG * draft_prob_BG < target_prob_BG
    num_accepted_B = leading(accept_BG, proposal.num_draft_B)

    rejected_B = num_accepted_B < proposal.num_draft_B
    at_B = jnp.minimum(num_accepted_B, G - 1)
    p_BV = _row(target_probs_BTV, num_accepted_B)
    q_BV = (
        one_hot(_row(proposal.tokens_BG, at_B), V)
        if draft_probs_BGV is None
        else _row(draft_probs_BGV, at_B)
    )
    residual_BV = jnp.maximum(p_BV - q_BV, 0.0)
    # If p and q differ only by rounding, the residual may be empty: then p itself is right.
    use_residual_B = rejected_B & (jnp.sum(residual_BV, axis=-1) > 0.0)
    next_probs_BV = jnp.where(use_residual_B[:, None], residual_BV, p_BV)
    return num_accepted_B, sample(next_probs_BV, next_key_B)


def _row(values: jax.Array, index_B: jax.Array) -> jax.Array:
    """`values[b, index[b]]` for every row b."""
    index = index_B.reshape((-1,) + (1,) * (values.ndim - 1))
    return jnp.take_along_axis(values, index, axis=1)[:, 0]
