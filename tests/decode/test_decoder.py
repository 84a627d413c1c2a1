"""The engine: greedy identity, stop conditions, independence of rows, and what the compiled loop must not contain."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
    compilations,
    copies_of_what_is_kept,
    noisy_draft,
    tiny_draft,
    tiny_model,
    tiny_tokenizer,
)

from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.decode.programs import programs
from s2d_jax.errors import UserError
from s2d_jax.generation.buckets import bucket
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.model import kv_cache
from s2d_jax.weights.model import Draft, Model

PROMPTS = [[5, 9, 2], [7, 7, 1, 3, 30, 12, 50], [33, 4, 21, 60, 2], [1]]
# Caches of 128 positions in every test: 32 for the prompt, at most 32 new tokens, a margin of 64.
GREEDY = SamplingParams(max_new_tokens=30)
HOT = dataclasses.replace(GREEDY, temperature=1.0)
EXITS = (1, 2, 4)


@pytest.fixture(scope="module")
def target() -> Model:
    return tiny_model(num_layers=4, spread=14.0)


@pytest.fixture(scope="module")
def draft(target) -> Draft:
    return noisy_draft(target, EXITS, (0.4, 0.4, 0.0))


@pytest.fixture(scope="module")
def small() -> tuple[Model, Draft]:
    """Two layers, for what does not depend on depth."""
    return tiny_model(num_layers=2, spread=14.0), tiny_draft(exit_layers=(1, 2), spread=14.0)


def _reference(target, decoder, prompts, sampling=GREEDY):
    plain = SpeculativeDecoder(target, None, DecodeConfig(verify_width=decoder.verify_width))
    return plain.generate(prompts, sampling)


POLICIES = {
    "s2d": DecodeConfig(),
    "s2d heuristic": DecodeConfig(
        draft_length_rule="heuristic", num_draft_tokens=3, max_draft_tokens=5
    ),
    "s2d two exits": DecodeConfig(exits=(1, 4), num_draft_tokens=7),
    "sd@1": DecodeConfig(exits=(1,)),
    "sd@2 wide": DecodeConfig(exits=(2,), num_draft_tokens=7),
    "independent": DecodeConfig(exits=(4,)),
    "argmax": DecodeConfig(draft_sampling="argmax"),
    "never early": DecodeConfig(exit_thresholds=(1.0, 1.0, 0.0)),
    "always first": DecodeConfig(exit_thresholds=(0.0, 0.0, 0.0)),
}


# Every policy, and both drafters in both batches; policies that share programs take no time.
OTHER_BATCHES = [
    ("sd@1", 4),
    ("argmax", 4),
    ("s2d two exits", 1),
    ("sd@2 wide", 1),
    ("s2d heuristic", 1),
]
exhaustive = pytest.mark.exhaustive(
    "this policy in the other batch, this batch with other policies"
)


@pytest.mark.parametrize(
    ("policy", "batch"),
    [
        pytest.param(policy, batch, marks=exhaustive if (policy, batch) in OTHER_BATCHES else ())
        for policy in POLICIES
        for batch in (1, 4)
    ],
)
def test_greedy_equals_the_width_matched_reference(target, draft, policy, batch):
    decoder = SpeculativeDecoder(target, draft, POLICIES[policy])
    result = decoder.generate(PROMPTS[:batch], GREEDY)
    assert result.token_ids == _reference(target, decoder, PROMPTS[:batch]).token_ids
    assert all(len(ids) == GREEDY.max_new_tokens for ids in result.token_ids)
    assert result.stats.drafted_tokens == sum(result.stats.exit_histogram.values())


def test_exits_are_really_mixed(target, draft):
    """The identity tests would prove little if every token left at one exit."""
    stats = SpeculativeDecoder(target, draft).generate(PROMPTS, GREEDY).stats
    assert min(stats.exit_histogram.values()) > 0.02 * stats.drafted_tokens
    assert stats.mean_acceptance_length > 1.5


def test_thresholds_at_their_limits(target, draft):
    never = SpeculativeDecoder(target, draft, POLICIES["never early"]).generate(PROMPTS, GREEDY)
    first = SpeculativeDecoder(target, draft, POLICIES["always first"]).generate(PROMPTS, GREEDY)
    assert never.stats.exit_histogram[1] == never.stats.exit_histogram[2] == 0
    assert first.stats.exit_histogram[2] == first.stats.exit_histogram[4] == 0
    assert first.stats.draft_forwards[2] == first.stats.draft_forwards[4] == 0


def test_the_target_as_its_own_draft_is_always_accepted(target):
    stats = SpeculativeDecoder(target, target).generate(PROMPTS[:1], GREEDY).stats
    # 29 tokens after prefill's: four rounds of 6, then one of 5 (4 drafted, cut by the token budget).
    assert (stats.target_forwards, stats.accepted_tokens) == (5, stats.drafted_tokens)
    assert stats.drafted_tokens == 4 * 5 + 4
    assert stats.mean_acceptance_length == pytest.approx(29 / 5)


def test_mean_acceptance_length_leaves_prefill_out(target):
    stats = SpeculativeDecoder(target).generate(PROMPTS, GREEDY).stats
    assert stats.mean_acceptance_length == 1.0
    assert stats.emitted_tokens == 4 * 30
    assert stats.target_forwards == 4 * 29


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_does_not_depend_on_its_neighbours(target, draft, temperature):
    """Same batch width, other neighbours: the same tokens."""
    rows = [SamplingParams(temperature=temperature, seed=s, max_new_tokens=30) for s in range(4)]
    decoder = SpeculativeDecoder(target, draft)
    together = decoder.generate(PROMPTS, rows)
    short = [dataclasses.replace(row, max_new_tokens=1) for row in rows[1:]]
    alone = decoder.generate([PROMPTS[0], [2], [2], [2]], [rows[0], *short])
    moved = decoder.generate([*PROMPTS[1:], PROMPTS[0]], [*rows[1:], rows[0]])
    assert together.token_ids[0] == alone.token_ids[0] == moved.token_ids[3]


def test_rows_have_their_own_sampling(target, draft):
    """A greedy row in a sampled batch is greedy; the seed decides the others."""
    decoder = SpeculativeDecoder(target, draft)
    hot = SamplingParams(temperature=1.0, seed=3, max_new_tokens=20)
    cold = SamplingParams(max_new_tokens=20)
    one = decoder.generate([PROMPTS[1]] * 4, [hot, cold, hot, dataclasses.replace(hot, seed=4)])
    greedy = _reference(target, decoder, [PROMPTS[1]] * 4, cold)
    assert one.token_ids[1] == greedy.token_ids[0]
    assert one.token_ids[0] == one.token_ids[2] != one.token_ids[3]


def test_one_sampling_for_all_gives_each_row_its_seed(target, draft):
    ids = SpeculativeDecoder(target, draft).generate([PROMPTS[0]] * 4, HOT).token_ids
    assert len(set(map(tuple, ids))) == 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stop_tokens_end_a_row_and_are_kept(target, draft, temperature):
    free = SamplingParams(temperature=temperature, max_new_tokens=30)
    decoder = SpeculativeDecoder(target, draft)
    ids = decoder.generate(PROMPTS[1:2], free).token_ids[0]
    stop = ids[9]
    cut = dataclasses.replace(free, stop_token_ids=(stop,))
    result = decoder.generate(PROMPTS[1:2], cut)
    assert result.token_ids[0] == ids[: ids.index(stop) + 1]


def test_the_models_own_end_of_sequence(target, draft):
    ids = SpeculativeDecoder(target, draft).generate(PROMPTS[:1], GREEDY).token_ids[0]
    config = dataclasses.replace(target.config, eos_token_ids=(ids[4],))
    ending = dataclasses.replace(target, config=config)
    decoder = SpeculativeDecoder(ending, draft)
    stopped = decoder.generate(PROMPTS[:1], GREEDY).token_ids[0]
    assert stopped == ids[: ids.index(ids[4]) + 1]
    ignoring = dataclasses.replace(GREEDY, ignore_eos=True)
    assert decoder.generate(PROMPTS[:1], ignoring).token_ids[0] == ids


@pytest.mark.parametrize("new_tokens", [1, 2, 3])
def test_few_new_tokens(target, draft, new_tokens):
    sampling = SamplingParams(max_new_tokens=new_tokens)
    result = SpeculativeDecoder(target, draft).generate(PROMPTS, sampling)
    assert [len(ids) for ids in result.token_ids] == [new_tokens] * 4


def test_rows_with_different_numbers_of_stop_tokens(target, draft):
    decoder = SpeculativeDecoder(target, draft)
    free = decoder.generate(PROMPTS, GREEDY).token_ids
    stops = tuple(sorted(set(range(64)) - set(free[1][:-1])))[:11]
    rows = [GREEDY, dataclasses.replace(GREEDY, stop_token_ids=stops), GREEDY, GREEDY]
    assert len(stops) == 11
    result = decoder.generate(PROMPTS, rows)
    expected = next((i for i, token in enumerate(free[1]) if token in stops), 29)
    assert result.token_ids == [free[0], free[1][: expected + 1], *free[2:]]


def test_generation_ends_at_the_context(small):
    target, draft = small
    short = dataclasses.replace(target, config=dataclasses.replace(target.config, max_context=20))
    result = SpeculativeDecoder(short, draft).generate([list(range(1, 16))], GREEDY)
    assert len(result.token_ids[0]) == 5


other_rows = pytest.mark.exhaustive(
    "both sizes and both loops are there; test_trimmed_head has 80 mixed"
)


@pytest.mark.parametrize(
    ("vocab_size", "rows"),
    [
        (60, [GREEDY, GREEDY, HOT, HOT]),
        (80, [GREEDY] * 4),
        pytest.param(60, [GREEDY] * 4, marks=other_rows),
        pytest.param(80, [GREEDY, GREEDY, HOT, HOT], marks=other_rows),
    ],
    ids=["60 mixed", "80 greedy", "60 greedy", "80 mixed"],
)
def test_drafts_whose_table_has_less_or_more_padding(small, vocab_size, rows):
    """One tokenizer, tables padded differently: ids that the draft lacks have q = 0, others of it are never drafted."""
    tokenizer = tiny_tokenizer(56)
    target = dataclasses.replace(small[0], tokenizer=tokenizer)
    other = dataclasses.replace(tiny_model(vocab_size, 1, spread=6.0), tokenizer=tokenizer)
    decoder = SpeculativeDecoder(target, other)
    ids = decoder.generate(PROMPTS, rows).token_ids
    assert max(max(row) for row in ids) < 64
    greedy = [row for row, sampling in enumerate(rows) if sampling is GREEDY]
    expected = _reference(target, decoder, PROMPTS).token_ids
    assert [ids[row] for row in greedy] == [expected[row] for row in greedy]


sampled_loop = pytest.mark.exhaustive("test_draft_length.py and trees have sampled loops")


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(
    ("policy", "greedy"),
    [
        *(("s2d", True), ("independent", True)),
        *(pytest.param(policy, False, marks=sampled_loop) for policy in ("s2d", "independent")),
    ],
)
def test_no_cache_is_copied_in_the_compiled_round(target, draft, policy, greedy, batch):
    decoder = SpeculativeDecoder(target, draft, POLICIES[policy])
    sampling = SamplingParams(temperature=0.0 if greedy else 1.0, max_new_tokens=30)
    static, width, args = decoder.prepare(PROMPTS[:batch], sampling)
    (_, run), _ = programs(static, width, args)
    c = target.config
    # 32 prompt positions + 30 tokens + margin 64 -> capacity 128
    assert not copies_of_what_is_kept(run.as_text(), c, batch)
    cache_bytes = 2 * 4 * batch * c.num_kv_heads * 128 * c.head_dim * 4
    assert run.memory_analysis().alias_size_in_bytes >= 2 * cache_bytes


def test_the_copy_test_finds_what_xla_does_without_the_trick(monkeypatch):
    """A bare write of the only row makes XLA copy the caches, and the pattern of the test above sees it."""
    monkeypatch.setattr(kv_cache, "run_if", lambda predicate, body, carry: body(carry))
    small = tiny_model(
        num_layers=2, spread=14.0, max_context=255
    )  # shapes that nobody else compiles
    static, width, args = SpeculativeDecoder(small).prepare(PROMPTS[:1], GREEDY)
    (_, run), _ = programs(static, width, args)
    c = small.config
    shape = re.escape(f"f32[1,{c.num_kv_heads},{args[2].shape[1]},{c.head_dim}]")
    assert re.findall(rf"= {shape}\S* copy\(", run.as_text())


def test_a_second_prompt_of_the_bucket_compiles_nothing(small):
    own_shape = DecodeConfig(
        num_draft_tokens=2
    )  # programs are shared by all decoders of the process
    decoder = SpeculativeDecoder(*small, own_shape)
    first = decoder.generate([[1, 2, 3]], GREEDY)
    assert first.stats.seconds["compile"] > 0
    with compilations() as compiled:
        other = SamplingParams(max_new_tokens=32, stop_token_ids=(63,))
        second = decoder.generate([list(range(32))], other)  # the longest of the bucket
    assert second.stats.seconds["compile"] == 0
    assert not compiled


def test_the_host_is_asked_once_per_call(target, draft, monkeypatch):
    """One loop is started and one result is fetched; reading any array in between would raise."""
    decoder = SpeculativeDecoder(target, draft)
    expected = decoder.generate(PROMPTS, GREEDY).token_ids
    fetches, starts, reads = [], [], []
    original, array_type, compiled = jax.device_get, type(jnp.zeros(1)), jax.stages.Compiled
    read, call = array_type.__array__, compiled.__call__

    def fetch(tree):
        fetches.append(1)
        with monkeypatch.context() as allowed:
            allowed.setattr(array_type, "__array__", read)
            return original(tree)

    def start(self, *args):
        starts.append(1)
        return call(self, *args)

    def forbidden(self, *args, **kwargs):
        reads.append(1)
        return read(self, *args, **kwargs)

    monkeypatch.setattr(jax, "device_get", fetch)
    monkeypatch.setattr(array_type, "__array__", forbidden)
    monkeypatch.setattr(array_type, "__bool__", lambda self: reads.append(1) or bool(read(self)))
    monkeypatch.setattr(compiled, "__call__", start)
    assert decoder.generate(PROMPTS, GREEDY).token_ids == expected
    assert (len(starts), len(fetches), len(reads)) == (2, 1, 0)


def test_bad_requests_say_what_is_wrong(target, draft):
    decoder = SpeculativeDecoder(target, draft)
    with pytest.raises(
        UserError, match=r"the prompt is empty: it gives no token; give at least one"
    ):
        decoder.generate([[]], GREEDY)
    with pytest.raises(
        UserError, match=r"the prompt has 300 tokens, the target's context is 256; shorten"
    ):
        decoder.generate([[1] * 300], GREEDY)
    with pytest.raises(UserError, match=r"there are no prompts; give at least one"):
        decoder.generate([], GREEDY)
    with pytest.raises(UserError, match=r"token id 9999; the model's ids are 0 to 63"):
        decoder.generate([[1, 9999]], GREEDY)
    with pytest.raises(UserError, match=r"1 sampling parameters for 4 prompts; give one each"):
        decoder.generate(PROMPTS, [GREEDY])
    with pytest.raises(UserError, match=r"the draft has no exit at \[3\]; it has \(1, 2, 4\)"):
        SpeculativeDecoder(target, draft, DecodeConfig(exits=(3,)))
    with pytest.raises(UserError, match=r"vocab_size=32 differs from the target's 64"):
        SpeculativeDecoder(target, tiny_draft(32, (1, 2)))
    with pytest.raises(
        UserError, match=r"is text, but tiny seed 0 has no tokenizer; give token ids"
    ):
        decoder.generate(["hello"], GREEDY)


@pytest.mark.parametrize(
    ("length", "expected"),
    [(1, 32), (32, 32), (33, 48), (49, 64), (65, 96), (1000, 1024), (1025, 1536)],
)
def test_buckets(length, expected):
    assert bucket(length) == expected


def test_seeds_are_reproducible(target, draft):
    hot = SamplingParams(temperature=0.9, top_k=20, top_p=0.9, min_p=0.01, max_new_tokens=25)
    runs = [SpeculativeDecoder(target, draft).generate(PROMPTS, hot).token_ids for _ in range(2)]
    assert runs[0] == runs[1]
    np.testing.assert_array_less(-1, np.concatenate(runs[0]))
