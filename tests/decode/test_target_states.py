"""What a drafter that asks for the target's states sees: those of the text so far, after chains and after trees."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import noisy_pair
import numpy as np
import pytest
from noisy_pair import EXITS, GREEDY

from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.tree import TreeShape
from s2d_jax.draft.sorted import SortedDrafter
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.generation.plan import Plan
from s2d_jax.generation.planner import Planner
from s2d_jax.generation.session import Session
from s2d_jax.generation.stream import Stream
from s2d_jax.tree.drafter import TreeDrafter
from s2d_jax.weights.model import Draft, Model

SHOWN = ("input_1", "final_norm")
PROMPTS = [[5, 9, 2], [7, 7, 1, 3, 30, 12, 50]]
CONFIGS = {
    "chain": DecodeConfig(EXITS, num_draft_tokens=3, initial_room=16),
    "tree": DecodeConfig(EXITS, tree=TreeShape(depth=3, top_k=2, nodes=6), initial_room=16),
}


@pytest.fixture(scope="module")
def target() -> Model:
    return noisy_pair.make_target()


@pytest.fixture(scope="module")
def draft(target) -> Draft:
    return noisy_pair.make_draft(target)


def _limited(num_draft_B, length_B, seen) -> jax.Array:
    """What a drafter may draft: nothing where the state of the last position that the target has read says so."""
    at_B11 = (length_B - 2)[:, None, None]
    last_BD = jnp.take_along_axis(seen["final_norm"], at_B11, axis=1)[:, 0]
    return jnp.where(last_BD[:, 0] > 0, num_draft_B, 0)


class LookingChain(SortedDrafter):
    """A chain where the target's state allows it."""

    target_states = SHOWN

    def propose(self, params, state, tokens_BC, length_B, num_draft_B, key_B, request, seen):
        num_draft_B = _limited(num_draft_B, length_B, seen)
        rest = tokens_BC, length_B, num_draft_B, key_B, request, seen
        return super().propose(params, state, *rest)


class LookingTree(TreeDrafter):
    """A tree where the target's state allows it."""

    target_states = SHOWN

    def propose(self, params, state, tokens_BC, length_B, num_draft_B, key_B, request, seen):
        num_draft_B = _limited(num_draft_B, length_B, seen)
        rest = tokens_BC, length_B, num_draft_B, key_B, request, seen
        return super().propose(params, state, *rest)


def _looking(plan: Plan) -> Plan:
    """The plan with a drafter that looks."""
    old = plan.decoder
    kind = LookingTree if isinstance(old.drafter, TreeDrafter) else LookingChain
    fields = {f.name: getattr(old.drafter, f.name) for f in dataclasses.fields(old.drafter)}
    drafter, changed = kind(**fields), {}
    if kind is LookingTree:
        changed["verifier"] = dataclasses.replace(old.verifier, drafter=drafter)
    changed["target"] = dataclasses.replace(old.target, shown=drafter.target_states)
    decoder = dataclasses.replace(old, drafter=drafter, **changed)
    return dataclasses.replace(plan, decoder=decoder)


def _check_states(session: Session, model) -> None:
    """Every state that is kept of the text so far is that of one pass over it."""
    state = jax.device_get(session._state)
    for row, length in enumerate(state.length_B):
        text_1T = jnp.asarray(state.tokens_BC[row : row + 1, :length])
        layers = (1, model.config.num_layers)
        apply = model.transformer.apply
        after = apply({"params": model.params}, text_1T, exit_layers=layers, method="exit_hiddens")
        normed = apply({"params": model.params}, after[1], method="normed")
        for name, expected in zip(SHOWN, (after[0], normed), strict=True):
            got = state.target_cache.states[name][row, : length - 1]
            np.testing.assert_allclose(got, expected[0, : length - 1], atol=2e-4, err_msg=name)


@pytest.mark.parametrize(
    "way",
    [
        pytest.param("chain", marks=pytest.mark.exhaustive("a tree's rounds have chains in them")),
        "tree",
    ],
)
def test_a_drafter_sees_the_states_of_the_text(target, draft, way):
    """Over prefill in chunks, rounds of all lengths, growing caches, and a second turn that rewinds."""
    planner, session = Planner(target, draft, CONFIGS[way]), Session()
    first = Stream(session, _looking(planner.plan(PROMPTS, GREEDY)), keep=True).finish()
    _check_states(session, target)
    rounds, drafted = first.stats.target_forwards, first.stats.drafted_per_depth[0]
    assert 0.2 * rounds < drafted < 0.8 * rounds  # plain rounds, and others
    later = [[*p, *ids[:9], 11, 4] for p, ids in zip(PROMPTS, first.token_ids, strict=True)]
    second = Stream(session, _looking(planner.plan(later, GREEDY)), keep=True).finish()
    _check_states(session, target)
    assert max(row.prefilled_tokens for row in second.row_stats) < 4
    plain = SpeculativeDecoder(target)
    assert first.token_ids == plain.generate(PROMPTS, GREEDY).token_ids
    assert second.token_ids == plain.generate(later, GREEDY).token_ids


@pytest.mark.parametrize("way", CONFIGS)
def test_who_asks_for_no_states_pays_for_none(target, draft, way):
    decoder, width, args = SpeculativeDecoder(target, draft, CONFIGS[way]).prepare(PROMPTS, GREEDY)
    params, request, tokens_BC, length_B = args
    state = jax.eval_shape(lambda: decoder.prefill(params, request, tokens_BC, length_B, width))
    assert state.target_cache.states == {}
