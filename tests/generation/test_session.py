"""Long prompts in chunks, caches that grow, and turns that use the caches of earlier turns."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from tiny import tiny_model, tiny_params, tiny_tokenizer

from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.draft import DraftConfig
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.decode.programs import programs
from s2d_jax.errors import UserError
from s2d_jax.generation.buckets import chunk_width
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.model.transformer import Transformer
from s2d_jax.weights.model import Draft

VOCAB = 300
PROMPTS = [list(range(3, 63)), [7, 7, 1, 3, 30, 12, 50]]
GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True)
CONFIG = DecodeConfig(num_draft_tokens=3)


@pytest.fixture(scope="module")
def target():
    model = tiny_model(VOCAB, 2, spread=14.0, max_context=2048)
    return dataclasses.replace(model, tokenizer=tiny_tokenizer(VOCAB))


@pytest.fixture(scope="module")
def drafts(target):
    """By way of drafting: a sorted draft whose exits disagree, the same as an independent model, none."""
    noise = tiny_params(target.config, seed=9)
    params = jax.tree.map(lambda x, n: x + n if x.ndim == 2 else x, target.params, noise)
    exits = DraftConfig((1, 2), (0.5, 0.0))
    draft = Draft(target.config, params, target.tokenizer, "noisy", exits)
    whole = dataclasses.replace(target, params=params)
    return {"sorted": draft, "independent": whole, "none": None}


def decoder_of(target, drafts, way, **changes):
    return SpeculativeDecoder(target, drafts[way], dataclasses.replace(CONFIG, **changes))


@pytest.mark.parametrize(
    ("length", "longest", "expected"),
    [
        (20, 512, 32),
        (500, 512, 512),
        (513, 512, 384),
        (4000, 512, 512),
        (1100, 512, 384),
        (9, 4, 4),
    ],
)
def test_width_of_chunks(length, longest, expected):
    assert chunk_width(length, longest) == expected


def test_a_prompt_in_chunks_leaves_what_one_pass_leaves(target, drafts):
    """The caches of target and draft, and what enters the draft's segments; rows end in different chunks."""
    states = []
    for chunk in (512, 16):
        decoder = decoder_of(target, drafts, "sorted", prefill_chunk=chunk)
        static, width, args = decoder.prepare(PROMPTS, GREEDY)
        assert width == min(chunk, 64)
        states.append(programs(static, width, args)[0].prefill(*args))
    one, many = states
    for row, length in enumerate(one.length_B):
        np.testing.assert_array_equal(one.tokens_BC[row, :length], many.tokens_BC[row, :length])
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        if a.ndim < 3:  # lengths and counters
            continue
        axis = 2 if a.ndim == 4 else 1
        for row, ids in enumerate(PROMPTS):
            known = [np.moveaxis(np.asarray(x[row]), axis - 1, 0)[: len(ids)] for x in (a, b)]
            np.testing.assert_allclose(*known, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(one.target_cache.length_B, many.target_cache.length_B)


def test_logits_after_a_prompt_in_chunks(target):
    """Against the model without a cache, by the distribution that prefill's token is drawn from."""
    decoder = SpeculativeDecoder(target, None, DecodeConfig(prefill_chunk=16))
    static, width, args = decoder.prepare(PROMPTS, GREEDY)
    seen = []
    original = type(static)._sample
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(static), "_sample", lambda *a: seen.append(a[1]) or original(*a))

        def logits(*args):
            static.prefill(*args, width)
            return seen.pop()

        got_B1V = jax.jit(logits)(*args)
    tokens_BT = args[2][:, : len(PROMPTS[0])]
    expected_BTV = jax.jit(Transformer(target.config).apply)({"params": target.params}, tokens_BT)
    for row, ids in enumerate(PROMPTS):
        expected_V = expected_BTV[row, len(ids) - 1]
        np.testing.assert_allclose(got_B1V[row, 0], expected_V, rtol=1e-4, atol=1e-4)


def test_memory_of_a_long_prompt_does_not_grow_with_its_square(target):
    def temporaries(chunk):
        decoder = SpeculativeDecoder(target, None, DecodeConfig(prefill_chunk=chunk))
        static, width, args = decoder.prepare([[1] * 1000], GREEDY)
        compiled = jax.jit(static.prefill, static_argnums=4).lower(*args, width).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(64) < 0.2 * temporaries(1024)


@pytest.mark.parametrize("way", ["sorted", "independent", "none"])
def test_a_later_turn_equals_a_fresh_start(target, drafts, way):
    decoder = decoder_of(target, drafts, way)
    conversation = decoder.conversation()
    first = conversation.generate(PROMPTS, GREEDY)
    assert first.token_ids == decoder.generate(PROMPTS, GREEDY).token_ids
    assert [row.prefilled_tokens for row in first.row_stats] == [len(p) for p in PROMPTS]
    # Row 0 goes on; row 1 is told another story from its fourth token on.
    later = [[*PROMPTS[0], *first.token_ids[0], 9, 8, 7], [7, 7, 1, 8, 8, 8, 8, 8, 8, 8, 8]]
    second = conversation.generate(later, GREEDY)
    fresh = decoder.generate(later, GREEDY)
    assert second.token_ids == fresh.token_ids
    # The last token of a turn has not been through the target.
    assert [row.prefilled_tokens for row in second.row_stats] == [4, 8]
    assert second.stats.drafted_tokens == fresh.stats.drafted_tokens
    assert second.stats.exit_histogram == fresh.stats.exit_histogram
    # Two turns later nothing has gone astray; the same prompt again computes one token.
    third = [[*later[0], *second.token_ids[0], 5], later[1]]
    again = conversation.generate(third, GREEDY)
    assert again.token_ids == decoder.generate(third, GREEDY).token_ids
    assert [row.prefilled_tokens for row in again.row_stats] == [2, 1]


def test_other_rows_start_afresh(target, drafts):
    decoder = decoder_of(target, drafts, "sorted")
    conversation = decoder.conversation()
    conversation.generate(PROMPTS, GREEDY)
    swapped = conversation.generate(PROMPTS[::-1], GREEDY)
    assert swapped.token_ids == decoder.generate(PROMPTS[::-1], GREEDY).token_ids
    assert [row.prefilled_tokens for row in swapped.row_stats] == [7, 60]


def test_a_turn_after_a_cancelled_stream(target, drafts):
    decoder = decoder_of(target, drafts, "sorted")
    conversation = decoder.conversation()
    with conversation.stream(PROMPTS, GREEDY, rounds_per_look=1) as stream:
        for _ in range(6):
            next(stream)
    heard = stream.result.token_ids
    later = [[*p, *ids, 11] for p, ids in zip(PROMPTS, heard, strict=True)]
    second = conversation.generate(later, GREEDY)
    assert second.token_ids == decoder.generate(later, GREEDY).token_ids
    assert [row.prefilled_tokens for row in second.row_stats] == [2, 2]


def test_asking_keeps_the_messages(target):
    decoder = SpeculativeDecoder(target)
    conversation = decoder.conversation()
    sampling = dataclasses.replace(GREEDY, ignore_eos=False)
    one = conversation.ask("one two", sampling)
    text = "".join(delta.text for delta in conversation.ask_stream("three", sampling))
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["user", "assistant"] * 2
    assert conversation.messages[1]["content"] == one.texts[0]
    assert conversation.messages[3]["content"] == text
    assert decoder.generate([conversation.messages[:3]], [sampling]).texts == [text]
    bare = SpeculativeDecoder(dataclasses.replace(target, tokenizer=None))
    with pytest.raises(UserError, match="has no tokenizer; use generate"):
        bare.conversation().ask("one")


@pytest.mark.parametrize(
    "way",
    [
        "sorted",
        pytest.param(
            "independent",
            marks=pytest.mark.exhaustive("a draft of one segment grows the same caches"),
        ),
    ],
)
def test_caches_grow_when_they_are_full(target, drafts, way):
    """Rows end at different lengths; one that has ended must not be overwritten while the other goes on."""
    rows = [dataclasses.replace(GREEDY, max_new_tokens=n) for n in (35, 190)]
    roomy = decoder_of(target, drafts, way).generate(PROMPTS, rows)
    tight = decoder_of(target, drafts, way, initial_room=32)
    assert tight.prepare(PROMPTS, rows)[2][2].shape == (2, 192)
    assert tight.generate(PROMPTS, rows).token_ids == roomy.token_ids
    assert [len(ids) for ids in roomy.token_ids] == [35, 190]
    assert tight.stream(PROMPTS, rows).finish().token_ids == roomy.token_ids


def test_a_later_turn_grows_the_caches(target):
    decoder = SpeculativeDecoder(target)
    conversation = decoder.conversation()
    first = conversation.generate(PROMPTS, GREEDY)
    later = [[*p, *ids, *range(3, 43)] for p, ids in zip(PROMPTS, first.token_ids, strict=True)]
    second = conversation.generate(later, GREEDY)
    assert second.token_ids == decoder.generate(later, GREEDY).token_ids
    assert [row.prefilled_tokens for row in second.row_stats] == [41, 41]
