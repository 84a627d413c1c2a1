"""The lazy catch-up of the sorted drafter against a slow reference that recomputes every sequence from its first token."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference_transformer import all_depths
from tiny import tiny_config, tiny_params

from s2d_jax.draft.chain import ChainConfig
from s2d_jax.draft.segments import Segments
from s2d_jax.draft.sorted import SortedDrafter
from s2d_jax.model.transformer import Transformer

PROMPT_WIDTH, CAPACITY, DRAFT_WIDTH = 8, 128, 4
ROUNDS_PER_EXAMPLE = 20
EXAMPLES = 100  # 100 x 20 = 2,000 rounds
VOCAB = 16
EXITS = {2: (2, 3), 3: (1, 2, 4), 4: (1, 2, 3, 4)}


@functools.cache
def _compiled(num_exits: int, batch: int):
    """The drafter under test, its parameters, and its catch-up compiled for each segment."""
    exits = EXITS[num_exits]
    config = tiny_config(VOCAB, exits[-1], embed_dim=16, ffw_dim=16, num_heads=2, num_kv_heads=1)
    params = tiny_params(config, seed=num_exits, spread=5.0)
    segments = Segments(Transformer(config), exits, VOCAB)
    chain = ChainConfig(DRAFT_WIDTH, VOCAB, True, True)
    drafter = SortedDrafter(segments, chain, catch_up_width=3)
    init = jax.jit(lambda tokens, length: drafter.init(params, tokens, length, PROMPT_WIDTH, {}))

    @functools.partial(jax.jit, static_argnums=1)
    def catch_up(state, s, tokens_BC, end_B):
        width = 2 if s == 0 else drafter.catch_up_width
        state, out_B1D = drafter.segments.catch_up(params, state, s, tokens_BC, end_B, width)
        return state, out_B1D[:, 0]

    host_params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    return drafter, config, host_params, init, catch_up, jax.jit(drafter.rewind)


class SlowReference:
    """Plain lists: the true tokens of each row, and how many positions each segment has computed."""

    def __init__(self, prompts, num_segments):
        self.tokens = [list(prompt) for prompt in prompts]
        self.computed = [[len(prompt)] * num_segments for prompt in prompts]

    def draft(self, row, exit_index):
        """The row's pending tokens go through segment 0; those that earlier tokens skipped follow as deep as this one goes."""
        for s in range(exit_index + 1):
            self.computed[row][s] = len(self.tokens[row])

    def rewind(self, row, length):
        self.tokens[row] = self.tokens[row][:length]
        self.computed[row] = [min(n, length) for n in self.computed[row]]


def _check_round(state, read, drafter, config, params, reference):
    """What was read at exits, lengths, keys, values and segment entries equal those of the recomputed sequences."""
    bounds, state = (0, *drafter.segments.exit_layers), jax.device_get(state)
    for row, tokens in enumerate(reference.tokens):
        states, keys, values = all_depths(config, params, tokens)
        for exit_index, position, out_D in read[row]:
            expected = states[bounds[exit_index + 1]][position]
            np.testing.assert_allclose(out_D, expected, rtol=2e-4, atol=2e-4)
        for s, cache in enumerate(state.segments):
            computed = reference.computed[row][s]
            assert int(cache.length_B[row]) == computed
            for i, layer in enumerate(range(bounds[s], bounds[s + 1])):
                for ours, theirs in (
                    (cache.keys[i], keys[layer]),
                    (cache.values[i], values[layer]),
                ):
                    ours_TKH = ours[row].swapaxes(0, 1)[:computed]
                    np.testing.assert_allclose(ours_TKH, theirs[:computed], rtol=2e-4, atol=2e-4)
            if s < len(state.entries):
                entries = state.entries[s][row][:computed]
                expected = states[bounds[s + 1]][:computed]
                np.testing.assert_allclose(entries, expected, rtol=2e-4, atol=2e-4)


def _draft_round(data, rng, compiled, state, reference, tokens):
    """Rows draft different numbers of tokens and leave at different exits.

    Returns the state, and per row what was read: (exit, position, the exit's output).
    """
    drafter, _, _, _, catch_up, _ = compiled
    num_segments, batch = len(drafter.segments.exit_layers), len(reference.tokens)
    counts = data.draw(st.lists(st.integers(0, DRAFT_WIDTH), min_size=batch, max_size=batch))
    read = [[] for _ in range(batch)]
    for step in range(max(counts)):
        exits = rng.choice(num_segments, size=batch, p=_exit_odds(num_segments))
        leaving = {row: int(exits[row]) for row in range(batch) if step < counts[row]}
        for s in range(num_segments):
            end_B = np.zeros(batch, np.int32)
            for row, exit_index in leaving.items():
                end_B[row] = len(reference.tokens[row]) if exit_index >= s else 0
            state, out_BD = catch_up(state, s, tokens, end_B)
            out_BD = np.asarray(out_BD)
            for row, exit_index in leaving.items():
                if exit_index == s:
                    position = len(reference.tokens[row]) - 1
                    read[row].append((s, position, out_BD[row]))
        for row, exit_index in leaving.items():
            reference.draft(row, exit_index)
            _append(rng, reference, tokens, row)
    return state, read


def _exit_odds(num_segments):
    """Early exits are the common ones, so that many tokens wait before one goes deep."""
    odds = 0.4 ** np.arange(num_segments)
    return odds / odds.sum()


def _append(rng, reference, tokens, row):
    token = int(rng.integers(VOCAB))
    tokens[row, len(reference.tokens[row])] = token
    reference.tokens[row].append(token)


OTHER_EXITS = pytest.mark.exhaustive("three exits have all that two and four have")


@pytest.mark.parametrize(
    "num_exits", [pytest.param(2, marks=OTHER_EXITS), 3, pytest.param(4, marks=OTHER_EXITS)]
)
@settings(
    max_examples=EXAMPLES // 3 + 1,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(data=st.data())
def test_catch_up_equals_the_slow_reference(num_exits, data):
    batch = data.draw(st.sampled_from([1, 3]))  # each is a program of its own
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    compiled = drafter, config, params, init, _, rewind = _compiled(num_exits, batch)
    prompts = [rng.integers(VOCAB, size=rng.integers(1, PROMPT_WIDTH + 1)) for _ in range(batch)]
    tokens = np.zeros((batch, CAPACITY), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    state = init(tokens, np.array([len(prompt) for prompt in prompts], np.int32))
    reference = SlowReference(prompts, num_exits)
    for row in range(batch):
        _append(rng, reference, tokens, row)  # the token that prefill emits
    for _ in range(ROUNDS_PER_EXAMPLE):
        starts = [len(row) for row in reference.tokens]
        assert max(starts) + drafter.margin < CAPACITY
        state, read = _draft_round(data, rng, compiled, state, reference, tokens)
        _check_round(state, read, drafter, config, params, reference)
        kept = []
        for row, start in enumerate(starts):
            kept.append(start + int(rng.integers(len(reference.tokens[row]) - start + 1)))
            reference.rewind(row, kept[-1])
            _append(rng, reference, tokens, row)  # the target's own token
        state = rewind(state, np.asarray(kept, np.int32))
