"""The guard: per row, speculation goes on only while it can afford to.

The unit is one round of plain decoding, which emits one token. A round that drafts costs `c` and emits `e` tokens, so it saves
`e - c` (or loses, when negative); the costs are those that calibration measured. Each row has a *credit*:

    credit = allowance                  at the start: 0.015 * min(max_new_tokens, 256); at least a failed chain (or two trees)
           + 0.005 for every emitted token
           + what rounds that drafted have saved, losses included (the sum is capped at `allowance + CREDIT_CAP`)

and it drafts a chain only as long as the credit covers the worst case, in which nothing is accepted (and the draft has to
catch up first): so the credit never falls below 0. Hence for N emitted tokens

    cost of decoding  <=  1.005 N + max(0.015 min(max_new_tokens, 256), F)

where F is what the policy's longest chain costs when all of it is rejected. For a request of 256 tokens, that is at most
1.02 N, **0.98 of plain decoding**, whatever the draft is. The same holds for a request that asks for at least F / 0.015 tokens
and emits them all; a shorter one may lose one failed chain, F. (Without that much a good draft could not begin:
docs/experiments.md. What speculation saved before may be lost again; the cap keeps that to a few rounds, so that a draft which
turns bad in mid-text is left soon.) Only prefill is outside of this account.

A chain that pays may use half of the credit, so that a bad start shortens chains before it ends them: a failed long chain is
followed by short ones, and a success by long ones. When not even one token is affordable, rounds are plain. A row that has
been plain for `wait` rounds may use its whole credit for one token, to see whether drafting pays again. The wait doubles with
each such probe that fails and starts anew with one that succeeds.

With a tree, a step is a level and a chain of n tokens is a tree of n levels; verifying costs what all nodes of the tree cost,
however many levels there are. A level that goes to a deeper exit takes the earlier levels along, so every level of a round is
charged as one at the deepest exit of that round. Shortening a tree therefore saves little: half of the credit must cover nearly
a whole tree, and F is the cost of two failed trees.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from s2d_jax.config.decode import DecodeConfig
from s2d_jax.draft.length import DraftingArrays

CREDIT_CAP = 8.0
EARNED_PER_TOKEN = 0.005
ALLOWANCE_PER_TOKEN = 0.015
ALLOWANCE_TOKENS = 256
FIRST_WAIT = 8
LONGEST_WAIT = 1024

# Steps of the draft in each row, by exit: arrays, or NumPy arrays once the host has them.
Steps = Int[Array | np.ndarray, "B E"]


class GuardState(flax.struct.PyTreeNode):
    """What speculation has saved in each row, and when it is tried again.

    Attributes:
        credit_B: f32, in plain rounds.
        plain_run_B: int32, plain rounds since the last round that drafted; the draft has not seen as many positions.
        wait_B: int32, plain rounds before the next probe.
        plain_rounds_B: int32, all rounds that drafted nothing.
        tried_B: bool, whether this round ran the draft.
        spent_B: f32, what that cost.
    """

    credit_B: jax.Array
    plain_run_B: jax.Array
    wait_B: jax.Array
    plain_rounds_B: jax.Array
    tried_B: jax.Array
    spent_B: jax.Array

    @classmethod
    def create(cls, drafting: DraftingArrays) -> GuardState:
        zeros_B = jnp.zeros_like(drafting.first_B)
        return cls(
            credit_B=drafting.allowance_B,
            plain_run_B=zeros_B,
            wait_B=jnp.full_like(zeros_B, FIRST_WAIT),
            plain_rounds_B=zeros_B,
            tried_B=zeros_B > 0,
            spent_B=jnp.zeros_like(drafting.allowance_B),
        )


def allowance(max_new_tokens: int, config: DecodeConfig) -> float:
    """Plain rounds that a request may lose. Only for a `config` with costs."""
    assert config.costs is not None
    losses, tree = worst_case(config.costs.draft_step, config.costs.verify), config.tree
    failed = losses[config.num_draft_tokens - 1] if tree is None else 2.0 * losses[tree.depth - 1]
    return max(ALLOWANCE_PER_TOKEN * min(max_new_tokens, ALLOWANCE_TOKENS), failed)


def worst_case(draft_step: Sequence[float], verify: Sequence[float]) -> list[float]:
    """What chains of 1, 2, ... tokens lose if nothing of them is accepted; a longer one never counts as cheaper."""
    step = max(draft_step)
    return list(
        itertools.accumulate((n * step + v - 1.0 for n, v in enumerate(verify) if n > 0), max)
    )


def affordable_length(guard: GuardState, drafting: DraftingArrays) -> Int[Array, "B"]:
    """int32: the longest chain that the credit covers if nothing of it is accepted; 0 is a plain round."""
    G = drafting.verify_cost_Y.shape[0] - 1
    if G == 0:
        return jnp.zeros_like(guard.plain_run_B)
    steps_G = jnp.arange(1, G + 1, dtype=jnp.float32) * jnp.max(drafting.step_cost_E)
    # A longer chain never counts as cheaper than a shorter one, whatever was measured.
    worst_G = jax.lax.cummax(steps_G + drafting.verify_cost_Y[1:] - 1.0)
    behind_B = guard.plain_run_B.astype(jnp.float32) * drafting.catch_up_cost
    half_B = 0.5 * guard.credit_B - behind_B
    length_B = jnp.sum(worst_G[None, :] <= half_B[:, None], axis=1).astype(jnp.int32)
    due_B = guard.plain_run_B >= guard.wait_B
    probe_B = due_B & (worst_G[0] <= guard.credit_B - behind_B)
    return jnp.maximum(length_B, probe_B.astype(jnp.int32))


def charge(guard: GuardState, drafting: DraftingArrays, steps_BE: Steps) -> GuardState:
    """Charges this round's drafting: `steps_BE` (int32), the draft steps by exit. A row that drafts has caught up."""
    steps_B = jnp.sum(steps_BE.astype(jnp.float32) * drafting.step_cost_E[None, :], axis=1)
    behind_B = guard.plain_run_B.astype(jnp.float32) * drafting.catch_up_cost
    return guard.replace(tried_B=jnp.any(steps_BE > 0, axis=1), spent_B=steps_B + behind_B)


def settle(
    guard: GuardState,
    drafting: DraftingArrays,
    num_draft_B: Int[Array, "B"],
    num_emitted_B: Int[Array, "B"],
    live_B: Bool[Array, "B"],
) -> GuardState:
    """Settles a round at its end: adds what it emitted, and takes what verifying cost."""
    tried_B = guard.tried_B
    emitted_B = num_emitted_B.astype(jnp.float32)
    saved_B = emitted_B - drafting.verify_cost_Y[num_draft_B] - guard.spent_B
    credit_B = guard.credit_B + jnp.where(tried_B, saved_B, 0.0) + EARNED_PER_TOKEN * emitted_B
    credit_B = jnp.minimum(credit_B, drafting.allowance_B + CREDIT_CAP)
    probe_B = tried_B & (guard.plain_run_B >= guard.wait_B)
    longer_B = jnp.minimum(2 * guard.wait_B, LONGEST_WAIT)
    wait_B = jnp.where(probe_B & (saved_B <= 0.0), longer_B, guard.wait_B)
    wait_B = jnp.where(tried_B & (saved_B > 0.0), FIRST_WAIT, wait_B)
    plain_B = live_B & (num_draft_B == 0)
    return guard.replace(
        credit_B=jnp.where(live_B, credit_B, guard.credit_B),
        plain_run_B=jnp.where(tried_B, 0, guard.plain_run_B + plain_B.astype(jnp.int32)),
        wait_B=jnp.where(live_B, wait_B, guard.wait_B),
        plain_rounds_B=guard.plain_rounds_B + plain_B.astype(jnp.int32),
    )
