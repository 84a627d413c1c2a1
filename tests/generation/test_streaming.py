"""Streaming: the tokens of `generate`, on the same compiled loop, stopped when nobody listens or a stop string appears."""

from __future__ import annotations

import dataclasses
import gc

import jax
import pytest
from noisy_pair import make_talking_decoder

from s2d_jax.config.sampling import SamplingParams
from s2d_jax.errors import UserError
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.sharding import MeshConfig, make_mesh, replicated

VOCAB = 300
PROMPTS = [[5, 9, 2], [7, 7, 1, 3, 30, 12, 50]]
GREEDY = SamplingParams(max_new_tokens=40, ignore_eos=True)
HOT = dataclasses.replace(GREEDY, temperature=1.0, seed=5)


@pytest.fixture(scope="module")
def decoder() -> SpeculativeDecoder:
    return make_talking_decoder()


def drained(stream, rows=2):
    texts, token_ids, ends = [""] * rows, [[] for _ in range(rows)], [0] * rows
    for delta in stream:
        texts[delta.row] += delta.text
        token_ids[delta.row] += delta.token_ids
        ends[delta.row] += delta.done
    assert ends == [1] * rows  # each row ends once
    return texts, token_ids


@pytest.mark.parametrize("sampling", [GREEDY, HOT], ids=["greedy", "sampled"])
def test_a_stream_is_generate_in_portions_and_compiles_nothing_of_its_own(decoder, sampling):
    whole = decoder.generate(PROMPTS, sampling)
    assert whole.stats.mean_acceptance_length > 1.2
    for rounds in (1, 8):
        stream = decoder.stream(PROMPTS, sampling, rounds_per_look=rounds)
        first = next(stream)
        assert (first.row, len(first.token_ids)) == (0, 1)  # prefill's token comes at once
        texts, token_ids = drained(stream)
        texts[0] = first.text + texts[0]
        assert texts == whole.texts == stream.result.texts
        assert [[*first.token_ids, *token_ids[0]], token_ids[1]] == whole.token_ids
        stats = stream.result.stats
        assert stats.seconds["compile"] == 0
        assert dataclasses.replace(stats, seconds={}) == dataclasses.replace(
            whole.stats, seconds={}
        )


def caches_alive(batch):
    """Arrays shaped as a cache is, by identity: other tests may keep some for as long as the process lives."""
    return {id(x): x for x in jax.live_arrays() if x.ndim == 4 and x.shape[0] == batch}


def test_closing_stops_decoding_and_frees_the_caches(decoder):
    whole = decoder.generate(PROMPTS, GREEDY)
    gc.collect()
    others = caches_alive(len(PROMPTS))
    with decoder.stream(PROMPTS, GREEDY, rounds_per_look=1) as stream:
        for number, _ in enumerate(stream):
            if number == 5:
                assert len(caches_alive(len(PROMPTS))) > len(others)
                break
    assert caches_alive(len(PROMPTS)).keys() <= others.keys()
    assert list(stream) == []
    for got, all_ids in zip(stream.result.token_ids, whole.token_ids, strict=True):
        assert 1 <= len(got) < len(all_ids) / 2
        assert got == all_ids[: len(got)]
    unused = decoder.stream(PROMPTS, GREEDY)
    unused.close()
    with pytest.raises(UserError, match=r"no result yet; iterate to its end, or call finish\(\)"):
        _ = unused.result


@pytest.mark.parametrize("sampling", [GREEDY, HOT], ids=["greedy", "sampled"])
def test_stop_strings_end_their_row_only(decoder, sampling):
    whole = decoder.generate(PROMPTS, sampling)
    stop = whole.texts[0][12:15]
    cut = whole.texts[0].index(stop)
    rows = [dataclasses.replace(sampling, seed=sampling.seed + i) for i in range(2)]
    rows[0] = dataclasses.replace(rows[0], stop=(stop, "never said"))
    result = decoder.generate(PROMPTS, rows)
    assert result.texts == [whole.texts[0][:cut], whole.texts[1]]
    kept = len(result.token_ids[0])
    assert result.token_ids == [whole.token_ids[0][:kept], whole.token_ids[1]]
    decode = decoder.target.tokenizer.decode_settled
    assert stop in decode(result.token_ids[0])
    assert stop not in decode(result.token_ids[0][:-1])
    stats = result.row_stats[0]
    assert stats.target_forwards < whole.row_stats[0].target_forwards
    assert stats.emitted_tokens == kept
    decoded = stats.emitted_tokens + stats.overshoot_tokens - 1
    assert stats.mean_acceptance_length == decoded / stats.target_forwards
    stream = decoder.stream(PROMPTS, rows, rounds_per_look=2)
    assert drained(stream) == (result.texts, result.token_ids)


def test_stop_strings_end_rows_of_a_group_that_was_filled_up(decoder):
    """Three prompts over two groups of devices: beside the third is a row that nobody asked for."""
    params = jax.device_put(decoder.target.params, replicated(make_mesh(MeshConfig(data=2))))
    target = dataclasses.replace(decoder.target, params=params)
    over_data = SpeculativeDecoder(target, decoder.draft, decoder.config)
    whole = decoder.generate(PROMPTS, GREEDY)
    stop = whole.texts[0][12:15]
    cut = whole.texts[0].index(stop)
    rows = [dataclasses.replace(GREEDY, stop=strings) for strings in ((), (), (stop,))]
    stream = over_data.stream([*PROMPTS, PROMPTS[0]], rows, rounds_per_look=2)
    texts, token_ids = drained(stream, rows=3)
    assert texts == stream.result.texts == [*whole.texts, whole.texts[0][:cut]]
    assert token_ids[:2] == whole.token_ids
    assert token_ids[2] == whole.token_ids[0][: len(token_ids[2])]
    stats = stream.result.row_stats
    assert stats[2].target_forwards < stats[0].target_forwards


def test_bad_requests_say_what_is_wrong(decoder):
    bare = SpeculativeDecoder(dataclasses.replace(decoder.target, tokenizer=None))
    with pytest.raises(UserError, match="has no tokenizer; use stop_token_ids"):
        bare.generate(PROMPTS, dataclasses.replace(GREEDY, stop=("x",)))
    with pytest.raises(UserError, match=r"stop=\('',\) must be texts"):
        SamplingParams(stop=("",))
    with pytest.raises(UserError, match="rounds_per_look=0 must be at least 1"):
        decoder.stream(PROMPTS, GREEDY, rounds_per_look=0)


def test_seconds_by_phase_add_up_to_the_total(decoder):
    whole = decoder.generate(PROMPTS, GREEDY)
    timed = decoder.generate(PROMPTS, GREEDY, time_rounds=True)
    assert timed.token_ids == whole.token_ids
    assert timed.stats.draft_forwards == whole.stats.draft_forwards
    seconds = dict(timed.stats.seconds)
    total = seconds.pop("total")
    del seconds["compile"]
    assert set(seconds) == {"prefill", "draft", "verify", "rest"}
    assert sum(seconds.values()) == pytest.approx(total)
    assert min(seconds.values()) > 0
    halves = decoder.generate(PROMPTS, GREEDY, time_phases=True).stats.seconds
    assert halves["prefill"] + halves["decode"] == pytest.approx(halves["total"])


def test_draft_lengths_are_counted(decoder):
    stats = decoder.generate(PROMPTS, GREEDY).stats
    histogram = stats.draft_length_histogram
    assert sum(histogram.values()) == stats.target_forwards
    assert sum(n * rounds for n, rounds in histogram.items()) == stats.drafted_tokens
    assert max(histogram) == 3
    assert stats.mean_draft_length == stats.drafted_tokens / stats.target_forwards


def test_warmup_compiles_what_a_prompt_of_the_bucket_needs(decoder):
    sampling = dataclasses.replace(GREEDY, max_new_tokens=130)  # a capacity of its own
    plain = SpeculativeDecoder(decoder.target)
    assert plain.warmup(buckets=(48,), batch_sizes=(3,), sampling=sampling) > 0
    prompts = [list(range(40)), [4, 5, 6], [7]]
    assert plain.generate(prompts, sampling).stats.seconds["compile"] == 0
