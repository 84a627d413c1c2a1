"""Who chose each token: the record of the loop against a replay of its rounds, in chains, trees, and all ways to run them."""

from __future__ import annotations

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import noisy_pair
import numpy as np
import pytest
from noisy_pair import EXITS, GREEDY, PROMPTS

from s2d_jax.config.costs import RoundCosts
from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.tree import TreeShape
from s2d_jax.draft.length import confidence
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.weights.model import Draft, Model

THRESHOLD = 0.4
CHAIN = DecodeConfig(EXITS, num_draft_tokens=3)
BY_NODE = TreeShape(depth=3, top_k=2, nodes=6, leaving="node")
PAYING = RoundCosts((0.1, 0.2), (1.0, 1.05, 1.1, 1.2))
LOSING = RoundCosts((0.5, 0.9), (1.0, 1.5, 2.0, 2.5))
HOT = dataclasses.replace(GREEDY, temperature=1.0, seed=3)
LONG = dataclasses.replace(GREEDY, max_new_tokens=100)


@pytest.fixture(scope="module")
def target() -> Model:
    return noisy_pair.make_target()


@pytest.fixture(scope="module")
def draft(target) -> Draft:
    return noisy_pair.make_draft(target)


@pytest.fixture(scope="module")
def read(draft):
    """Of a text the exit at which the draft leaves after each token, and what it would draft there by each exit."""

    @jax.jit
    def at_exits(params, tokens_BT):
        def apply(method, *args, **kwargs):
            return draft.transformer.apply({"params": params}, *args, method=method, **kwargs)

        hiddens = apply("exit_hiddens", tokens_BT, exit_layers=EXITS)
        return jnp.stack([apply("logits", h_BTD)[0] for h_BTD in hiddens])

    def read(ids):
        padded = np.zeros((1, 160), np.int32)
        padded[0, : len(ids)] = ids
        logits_ETV = at_exits(draft.params, jnp.asarray(padded))
        first = np.asarray(confidence(logits_ETV[0])) > THRESHOLD
        return np.where(first, *EXITS), np.asarray(logits_ETV.argmax(axis=-1))

    return read


def _replayed(prompt, emitted, read, exits, most) -> list[int | None]:
    """Greedy rounds with chains of `most` tokens: what is drafted and accepted, and one of the target's own."""
    text = [*prompt, *emitted]
    left_at, drafts_ET = read(text)
    found, at = [None], len(prompt) + 1
    while at < len(text):
        for _ in range(min(most, len(text) - at - 1)):
            exit = exits[0] if len(exits) == 1 else left_at[at - 1]
            if drafts_ET[EXITS.index(exit)][at - 1] != text[at]:
                break
            found.append(exit)
            at += 1
        found.append(None)
        at += 1
    return found


@pytest.mark.parametrize(
    ("config", "sampling"),
    [
        pytest.param(
            *(DecodeConfig((1,), num_draft_tokens=3), GREEDY),
            marks=pytest.mark.exhaustive("thresholds choose among several such"),
        ),
        (CHAIN, GREEDY),
        (dataclasses.replace(CHAIN, initial_room=8), LONG),
    ],
    ids=["fixed exit", "thresholds", "caches that grow"],
)
def test_chains_equal_their_replay(target, draft, read, config, sampling):
    decoder = SpeculativeDecoder(target, draft, config)
    result = decoder.generate(PROMPTS, sampling)
    assert result.stats.accepted_tokens > 20
    for prompt, row in zip(PROMPTS, result, strict=True):
        assert row.drafted_by == _replayed(prompt, row.token_ids, read, decoder.exits, 3)
    later = [[*p, *row.token_ids, 3] for p, row in zip(PROMPTS, result, strict=True)]
    if sampling is GREEDY:  # on the caches of an earlier turn
        conversation = decoder.conversation()
        conversation.generate(PROMPTS, sampling)
        for prompt, row in zip(later, conversation.generate(later, sampling), strict=True):
            assert row.drafted_by == _replayed(prompt, row.token_ids, read, decoder.exits, 3)


SAMPLED_TOO = pytest.mark.exhaustive("sampled trees and guarded chains record the same")


@pytest.mark.parametrize(
    ("config", "sampling"),
    [
        (CHAIN, HOT),
        pytest.param(DecodeConfig(EXITS, tree=BY_NODE), GREEDY, marks=SAMPLED_TOO),
        (DecodeConfig(EXITS, tree=BY_NODE), HOT),
        (dataclasses.replace(CHAIN, guard=True, costs=LOSING), GREEDY),
        pytest.param(
            dataclasses.replace(CHAIN, draft_length_rule="expected_gain", costs=PAYING),
            GREEDY,
            marks=SAMPLED_TOO,
        ),
    ],
    ids=[
        "sampled chain",
        "tree",
        "sampled tree",
        "guarded chain",
        "chain that ends where it no longer pays",
    ],
)
def test_the_record_agrees_with_confidences_and_counts(target, draft, read, config, sampling):
    result = SpeculativeDecoder(target, draft, config).generate(PROMPTS, sampling)
    assert result.stats.accepted_tokens > 5
    for prompt, row in zip(PROMPTS, result, strict=True):
        left_at, _ = read([*prompt, *row.token_ids])
        for at, exit in enumerate(row.drafted_by, start=len(prompt)):
            assert exit in (None, left_at[at - 1])
        counts = Counter(row.drafted_by)
        assert counts.pop(None) == row.stats.target_forwards + 1
        assert sum(counts.values()) == row.stats.accepted_tokens
        drafted = row.stats.exit_histogram
        assert sum(drafted.values()) == row.stats.drafted_tokens
        assert all(count <= drafted[exit] for exit, count in counts.items())
        if config.tree is None:  # steps that drafted nothing are counted, but not as tokens
            assert all(drafted[exit] <= row.stats.draft_steps[exit] for exit in EXITS)
    if config.draft_length_rule == "expected_gain":
        assert sum(result.stats.draft_steps.values()) > result.stats.drafted_tokens
    assert not config.guard or result.stats.plain_rounds > 0


@pytest.mark.exhaustive("shows that the tests above mean something")
def test_both_exits_are_accepted(target, draft):
    """The tests above would prove little if all tokens came from one exit."""
    for config in (CHAIN, DecodeConfig(EXITS, tree=BY_NODE)):
        rows = SpeculativeDecoder(target, draft, config).generate(PROMPTS, GREEDY)
        counts = Counter(exit for row in rows for exit in row.drafted_by)
        assert min(counts[exit] for exit in EXITS) >= 3


def test_rounds_in_parts_and_streams_record_the_same(target, draft):
    decoder = SpeculativeDecoder(target, draft, CHAIN)
    expected = [row.drafted_by for row in decoder.generate(PROMPTS, GREEDY)]
    timed = decoder.generate(PROMPTS, GREEDY, time_rounds=True)
    assert [row.drafted_by for row in timed] == expected
    streamed = decoder.stream(PROMPTS, GREEDY, rounds_per_look=2).finish()
    assert [row.drafted_by for row in streamed] == expected
    plain = SpeculativeDecoder(target).generate(PROMPTS, GREEDY)
    assert all(set(row.drafted_by) == {None} for row in plain)
