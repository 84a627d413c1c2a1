"""How many tokens a row drafts in a round. Everything that decides it is an array, so no setting compiles anything anew.

Two things set the length. Between rounds, `next_length` moves a row's limit (Hugging Face's heuristic; a fixed length does not
move). Within a round, `decide` may end the chain earlier. It sees only the largest entry of a step's q *vector*, and it decides
before a token is drawn from q: whether this token is drawn at all, and whether it is the last one. A drawn token is always
verified, so the target's distribution is kept whatever is decided here.

Expected gain. By renewal-reward, the lengths that maximise tokens per second are those that maximise, in each round,
`E[tokens] - rate * E[cost]`, where `rate` is the number of tokens per unit of cost that the whole policy reaches (at least 1: a
plain round costs 1 and emits 1). Let h be the product of the acceptance probabilities so far: the probability that the i tokens
drafted so far are all accepted. The next tokens are not known yet; each is taken to be accepted with the mean probability a,
and to cost one step s. Then n more tokens are worth

    h (a + a^2 + ... + a^n) - rate (n s + verify[i + n] - verify[i])

and the chain goes on while this is positive for some n. It helps to look ahead over all n, not just over one token, where the
cost of verifying rises in steps: the first token of a round pays for a wide pass that the next ones use for free.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from s2d_jax.config.costs import RoundCosts
from s2d_jax.config.decode import DecodeConfig

_IDENTITY = (0.0, 1.0)


class DraftingArrays(flax.struct.PyTreeNode):
    """What decides the draft length of every row.

    Attributes:
        first_B: int32, the limit of the first round.
        max_B: int32, the largest limit.
        grow_B: int32, added to the limit after a round that accepted all it drafted.
        shrink_B: int32, taken from the limit after any other round.
        min_confidence_B: f32; a token drafted with less is the last of its round. 0 never stops.
        gain_rate_B: f32, tokens per unit of cost that drafting on must bring; 0 never stops.
        allowance_B: f32, plain rounds that speculation may lose before the guard stops it; inf without a guard.
        step_cost_E: f32, cost of a drafted token by the exit it leaves at, in plain rounds.
        verify_cost_Y: f32 `[G + 1]`, cost of the rest of a round that drafted 0..G tokens.
        catch_up_cost: f32 scalar, cost of a position that the draft has not seen.
        acceptance_table: f32, for each exit the probability of acceptance at evenly spaced confidences.
        next_acceptance: f32 scalar, probability of acceptance of a token not drafted yet.
    """

    first_B: jax.Array
    max_B: jax.Array
    grow_B: jax.Array
    shrink_B: jax.Array
    min_confidence_B: jax.Array
    gain_rate_B: jax.Array
    allowance_B: jax.Array
    step_cost_E: jax.Array
    verify_cost_Y: jax.Array
    catch_up_cost: jax.Array
    acceptance_table: jax.Array
    next_acceptance: jax.Array

    @classmethod
    def create(
        cls,
        config: DecodeConfig,
        allowances: Sequence[float] | np.ndarray,
        width: int,
        num_exits: int,
    ) -> DraftingArrays:
        """The arrays of a call.

        Args:
            config: the rule and its parameters.
            allowances: plain rounds that each row may lose.
            width: G.
            num_exits: exits in use; at least 1 (also without a draft, where nothing reads the costs).
        """
        heuristic = config.draft_length_rule == "heuristic"
        gain = config.draft_length_rule == "expected_gain"
        watched = config.draft_length_rule == "confidence"
        costs = config.costs or RoundCosts((0.0,) * num_exits, (1.0,) * max(width + 1, 2))

        def rows(value, dtype=jnp.float32):
            return jnp.full((len(allowances),), value, dtype)

        return cls(
            first_B=rows(width if config.tree else min(config.num_draft_tokens, width), jnp.int32),
            max_B=rows(width, jnp.int32),
            grow_B=rows(2 if heuristic else 0, jnp.int32),
            shrink_B=rows(1 if heuristic else 0, jnp.int32),
            min_confidence_B=rows(config.min_confidence if watched else 0.0),
            gain_rate_B=rows(config.gain_rate if gain else 0.0),
            allowance_B=jnp.asarray(allowances, jnp.float32),
            step_cost_E=jnp.asarray(costs.draft_step, jnp.float32),
            verify_cost_Y=jnp.asarray(costs.verify[: width + 1], jnp.float32),
            catch_up_cost=jnp.float32(costs.catch_up),
            acceptance_table=jnp.asarray(costs.acceptance or (_IDENTITY,) * num_exits, jnp.float32),
            next_acceptance=jnp.float32(costs.next_acceptance),
        )


def next_length(
    drafting: DraftingArrays,
    limit_B: Int[Array, "B"],
    num_draft_B: Int[Array, "B"],
    num_accepted_B: Int[Array, "B"],
) -> Int[Array, "B"]:
    """int32: the limit of the next round."""
    change_B = jnp.where(num_accepted_B == num_draft_B, drafting.grow_B, -drafting.shrink_B)
    return jnp.clip(limit_B + change_B, 1, jnp.maximum(drafting.max_B, 1))


def confidence(logits: Float[Array, "*batch U"]) -> Float[Array, "*batch"]:
    """f32: the largest softmax probability of raw logits, before temperature and filters.

    Under a trimmed head the softmax is over the U listed tokens only, so the same threshold means a little less certainty
    than over all tokens. It depends on the vector q alone, so leaving by it keeps the target's distribution.
    """
    return jnp.exp(jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1))


def decide(
    drafting: DraftingArrays,
    i: Int[Array, ""],
    hope_B: Float[Array, "B"],
    confidence_B: Float[Array, "B"],
    exit_B: Int[Array, "B"],
    limit_B: Int[Array, "B"],
) -> tuple[Bool[Array, "B"], Bool[Array, "B"], Float[Array, "B"]]:
    """Whether the token of a step is drawn, and whether another step follows, before the token is drawn.

    Args:
        drafting: the rules.
        i: int32, tokens drafted before this one.
        hope_B: f32, the probability that all of those are accepted; 1 at first.
        confidence_B: f32, of this step's q.
        exit_B: int32, index of the exit that this step left at.
        limit_B: int32, the most that the row may draft in this round.

    Returns:
        `draw_B` and `more_B`, bool, and the `hope_B` that includes this token.
    """
    hope_B = hope_B * _acceptance(drafting.acceptance_table, exit_B, confidence_B)
    G = drafting.verify_cost_Y.shape[0] - 1
    step_cost_B = drafting.step_cost_E[exit_B]
    n_Y = jnp.arange(G + 1, dtype=jnp.int32)  # how many tokens after this one
    powers_Y = drafting.next_acceptance ** n_Y.astype(jnp.float32)
    further_Y = jnp.cumsum(powers_Y) - 1.0
    later_verify_Y = drafting.verify_cost_Y[jnp.minimum(i + 1 + n_Y, G)]
    possible_BY = (i + 1 + n_Y)[None, :] <= limit_B[:, None]
    steps_BY = n_Y.astype(jnp.float32)[None, :] * step_cost_B[:, None]

    def value_BY(tokens_Y, verify_before):
        cost_BY = steps_BY + (later_verify_Y - verify_before)[None, :]
        value = hope_B[:, None] * tokens_Y[None, :] - drafting.gain_rate_B[:, None] * cost_BY
        return jnp.where(possible_BY, value, -jnp.inf)

    verify_Y, free_B = drafting.verify_cost_Y, drafting.gain_rate_B == 0.0
    draw_value_BY = value_BY(1.0 + further_Y, verify_Y[jnp.minimum(i, G)])
    more_value_BY = value_BY(further_Y, verify_Y[jnp.minimum(i + 1, G)])[:, 1:]
    draw_B = free_B | (jnp.max(draw_value_BY, axis=-1) >= 0.0)
    more_B = free_B | (jnp.max(more_value_BY, axis=-1) > 0.0)
    more_B &= confidence_B >= drafting.min_confidence_B
    return draw_B, draw_B & more_B, hope_B


def _acceptance(acceptance_table, exit_B, confidence_B):
    """Linear interpolation in the table of each row's exit."""
    last = acceptance_table.shape[1] - 1
    at_B = jnp.clip(confidence_B, 0.0, 1.0) * last
    low_B = jnp.minimum(at_B.astype(jnp.int32), last - 1)
    share_B = at_B - low_B.astype(jnp.float32)
    below_B, above_B = acceptance_table[exit_B, low_B], acceptance_table[exit_B, low_B + 1]
    return below_B + share_B * (above_B - below_B)
