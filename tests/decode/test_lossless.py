"""Sampled output follows the target's distribution exactly: chi-square against enumeration, in every drafting mode.

False-alarm rate: each of the modes is tested at LEVEL = ALPHA / number of modes (Bonferroni), so a correct decoder fails the
whole file with probability at most ALPHA; seeds are fixed, so it then fails always or never.

A mode is looked at after 10,000, 50,000, 100,000 and 200,000 samples, and LEVEL is spent over the looks: what any of them
refuses has a false-alarm rate of its share. From the second look on a p-value above 0.3 passes at once. That cannot raise a
false alarm; a fault whose noncentrality is 400 after 200,000 samples (which are then always enough) passes that look with a
probability of 1.4%.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lossless_modes import (
    BY_LEVEL,
    EMITTED,
    LISTED,
    MODES,
    MORE_MODES,
    PARTS,
    PLAIN,
    VOCAB,
    WIDTH,
    Mode,
    all_modes,
)
from reference_sampling import filtered
from reference_transformer import all_depths, logits
from scipy import stats
from tiny import enumerable_draft, enumerable_model, with_parts

from s2d_jax import backends
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.decode.loop import Decoder
from s2d_jax.decode.target import Target
from s2d_jax.decode.verifier import ChainVerifier
from s2d_jax.draft import chain
from s2d_jax.draft.chain import ChainConfig
from s2d_jax.draft.length import DraftingArrays
from s2d_jax.draft.none import NoDrafter
from s2d_jax.draft.request import Request
from s2d_jax.draft.segments import Segments
from s2d_jax.draft.sorted import SortedDrafter
from s2d_jax.generation import build
from s2d_jax.generation.planner import Planner
from s2d_jax.model.transformer import Transformer
from s2d_jax.sampling import SamplingArrays
from s2d_jax.tree import acceptance as tree_acceptance
from s2d_jax.tree.growth import Growth
from s2d_jax.weights.model import with_trimmed_head
from s2d_jax.weights.prepare import prepare_for_decode
from s2d_jax.weights.vocabulary import DraftVocabulary

BATCH = 10_000
# Samples, and the share of LEVEL that this look may spend.
LOOKS = {10_000: 0.05, 50_000: 0.05, 100_000: 0.05, 200_000: 0.85}
SAMPLES = max(LOOKS)
# Much is computed here, so that a quick program is worth its compilation (conftest.py has the opposite).
OPTIMIZED: dict[str, int | bool] = {"xla_backend_optimization_level": 2}
if jax.__version_info__ < (0, 11):
    OPTIMIZED["xla_cpu_use_fusion_emitters"] = True
PASSES_AT_ONCE = 0.3
ALPHA = 1e-4
LEVEL = ALPHA / len([*MODES, *MORE_MODES])
PROMPT = (3, 1, 4, 1, 5)


def pytest_generate_tests(metafunc):
    if "mode" not in metafunc.fixturenames:
        return
    reason = "its features are apart in modes of every run, its formats in test_weight_formats.py"
    more = all_modes() if metafunc.config.getoption("--all-modes") else MORE_MODES
    marked = [
        pytest.param(mode, marks=pytest.mark.exhaustive(reason), id=str(mode))
        for mode in more
        if mode not in MODES
    ]
    metafunc.parametrize("mode", [*(pytest.param(mode, id=str(mode)) for mode in MODES), *marked])


def _decoder(mode: Mode, target, draft) -> Decoder:
    if mode.tree is not None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build, "_RETURN_WIDTH", 3)
            return Planner(target, draft, mode.config()).decoder(greedy=False)
    config = ChainConfig(WIDTH, VOCAB, greedy=False, sampled=mode.sampled, watched=mode.watched)
    model = draft.drafting_transformer
    exits, back = draft.draft_config.exit_layers, 3 if mode.guarded else 0
    drafter = {
        "none": NoDrafter(0),
        "independent": SortedDrafter(Segments(model, exits[-1:], VOCAB), config, 2, back),
        "fixed": SortedDrafter(Segments(model, (1,), VOCAB), config, 2, back),
        "thresholds": SortedDrafter(Segments(model, exits, VOCAB), config, 2, back),
    }[mode.policy]
    widths = (1,) if mode.policy == "none" else mode.config().verify_widths
    verifier = ChainVerifier(greedy=False, widths=widths)
    return Decoder(Target(Transformer(target.config, target.dtype)), drafter, verifier)


@functools.cache
def _models():
    # At this spread logits have a standard deviation of 1.7: distributions differ, with confidences from .3 to .85.
    target = enumerable_model(seed=0, spread=25.0)
    return target, enumerable_draft((1, 2, 3), seed=1, spread=25.0)


def _program(mode: Mode):
    """What all modes of `mode.program` share: the decoder, and its prefill and rounds as one compiled function."""
    target, draft = _models()
    if mode.parts:
        draft = with_parts(draft, PARTS)
    if mode.trimmed:
        draft = with_trimmed_head(draft, DraftVocabulary(np.array(LISTED)))
    target = prepare_for_decode(target, mode.target_format)
    draft = prepare_for_decode(draft, mode.draft_format)
    decoder = _decoder(mode, target, draft)
    params = {"target": target.params, "draft": draft.params if mode.policy != "none" else {}}
    width = len(PROMPT)
    capacity = width + EMITTED + 1 + decoder.margin

    @functools.partial(jax.jit, compiler_options=OPTIMIZED)
    def generate(params, request, first_seed):
        tokens_BC = jnp.zeros((BATCH, capacity), jnp.int32).at[:, :width].set(jnp.array([PROMPT]))
        length_B = jnp.full((BATCH,), width, jnp.int32)
        seeds_B = first_seed + jnp.arange(BATCH, dtype=jnp.uint32)
        request = request.replace(key_B=jax.vmap(jax.random.key)(seeds_B))
        state = decoder.prefill(params, request, tokens_BC, length_B, width)
        state = decoder.run(params, request, state)
        counters = decoder.drafter.stats(state.draft_state)
        counters |= {"rounds": state.rounds_B, "plain_rounds": state.guard.plain_rounds_B}
        return state.tokens_BC[:, width : width + EMITTED], counters

    return decoder, functools.partial(generate, params)


_shared_program = functools.lru_cache(maxsize=2)(_program)  # modes that share one are neighbours


def _request(mode: Mode, decoder: Decoder) -> Request:
    # Rows start with credits of many sizes, and spend them: plain rounds come before and after drafted ones.
    credits = np.arange(BATCH) % 50 / 10 if mode.guarded else np.full(BATCH, np.inf)
    return Request(
        sampling=SamplingArrays.stack([mode.sampling] * BATCH),
        key_B=jnp.zeros(()),  # each call makes its own
        # Room for one more, so that the first round may draft at its full length.
        max_length_B=jnp.full((BATCH,), len(PROMPT) + EMITTED + 1, jnp.int32),
        stop_ids_BZ=jnp.full((BATCH, 1), -1, jnp.int32),
        exit_threshold_E=jnp.array([0.85, 0.72, 0.0][: mode.num_exits]),
        max_rounds=jnp.int32(100),
        drafting=DraftingArrays.create(
            mode.config(), credits, decoder.drafter.width, mode.num_exits
        ),
        vocabulary_U=jnp.array(LISTED) if mode.trimmed else None,
    )


def _counts(mode: Mode, program=_program) -> Iterator[np.ndarray]:
    """Counts `[8, 8, 8]` of the first three tokens of 10,000 continuations, then of the next."""
    decoder, generate = program(mode.program)
    request = _request(mode, decoder)
    for call in range(SAMPLES // BATCH):
        emitted, drafted = jax.device_get(generate(request, jnp.uint32(call * BATCH)))
        if mode.policy == "thresholds":  # the test means nothing unless every exit is used
            assert (drafted["exit_counts"].sum(axis=0) > 0.03 * drafted["exit_counts"].sum()).all()
        if mode.guarded or mode.rule == "expected_gain":  # ... and rounds with and without drafts
            assert 0.05 < drafted["plain_rounds"].sum() / drafted["rounds"].sum() < 0.95
        counts = np.zeros((VOCAB,) * EMITTED, np.int64)
        np.add.at(counts, tuple(emitted.T), 1)
        yield counts


@functools.cache
def _exact(sampling: SamplingParams, target_format: str = "f32") -> np.ndarray:
    """The joint distribution `[8, 8, 8]` of the next three tokens, by enumeration in NumPy, with what the format holds."""
    target = prepare_for_decode(_models()[0], target_format)
    params = jax.tree.map(np.asarray, prepare_for_decode(target, "f32").params)

    def next_probs(tokens):
        state = all_depths(target.config, params, tokens)[0][-1]
        return filtered(logits(target.config, params, state)[-1], sampling)

    joint = np.zeros((VOCAB,) * EMITTED)
    first = next_probs(PROMPT)
    for a in range(VOCAB):
        second = next_probs((*PROMPT, a))
        for b in range(VOCAB):
            joint[a, b] = first[a] * second[b] * next_probs((*PROMPT, a, b))
    return joint


def _p_value(counts: np.ndarray, exact: np.ndarray) -> float:
    """Chi-square with cells of fewer than 10 expected samples pooled; impossible tokens must not appear."""
    counts, expected = counts.ravel(), exact.ravel() * counts.sum()
    assert counts[expected == 0].sum() == 0, "a token of probability 0 was emitted"
    sparse = expected < 10
    counts = np.append(counts[~sparse], counts[sparse].sum())
    expected = np.append(expected[~sparse], expected[sparse].sum())
    if expected[-1] == 0:
        counts, expected = counts[:-1], expected[:-1]
    return stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue


def _follows(batches: Iterator[np.ndarray], exact: np.ndarray) -> bool:
    """The verdict of the looks."""
    counts = np.zeros_like(exact, dtype=np.int64)
    for batch in batches:
        counts += batch
        if (share := LOOKS.get(counts.sum())) is None:
            continue
        p_value = _p_value(counts, exact)
        if p_value <= LEVEL * share:
            return False
        if p_value > PASSES_AT_ONCE and counts.sum() > min(LOOKS):
            return True
    return True


def test_emitted_tokens_follow_the_target(mode, monkeypatch):
    # The form that small batches use, for this large one.
    digits = {**backends.CPU.products, "int8": ((None, "two_digits"),)}
    cpu = dataclasses.replace(backends.CPU, products=digits)
    monkeypatch.setattr(backends, "BACKENDS", {**backends.BACKENDS, "cpu": cpu})
    exact = _exact(mode.sampling, mode.target_format)
    assert _follows(_counts(mode, _shared_program), exact)


def test_the_looks_together_keep_the_level(monkeypatch):
    """Samples of the law itself at a level of 2%: of 400 verdicts, refusals are no more than chance allows (99.99%)."""
    monkeypatch.setitem(globals(), "LEVEL", 0.02)
    rng, exact = np.random.default_rng(0), np.random.default_rng(1).dirichlet(np.ones(8))
    verdicts = [
        _follows((rng.multinomial(BATCH, exact) for _ in range(SAMPLES // BATCH)), exact)
        for _ in range(400)
    ]
    assert verdicts.count(False) <= stats.binom.ppf(0.9999, len(verdicts), 0.02)


@pytest.mark.parametrize("shift", [0.0, 0.02])
def test_a_small_shift_is_told_from_none(shift):
    """Two percent of one token's probability moved to another: always refused, as the law itself never is."""
    rng, exact = np.random.default_rng(2), np.full(8, 1 / 8)
    law = exact + shift * np.array([1, -1, 0, 0, 0, 0, 0, 0])
    verdicts = [
        _follows((rng.multinomial(BATCH, law) for _ in range(SAMPLES // BATCH)), exact)
        for _ in range(20)
    ]
    assert verdicts == [shift == 0.0] * 20


def test_the_formats_differ_enough_to_be_told_apart():
    """An int8 target is another distribution: samples of the f32 one would fail the test above."""
    f32, int8 = _exact(PLAIN), _exact(PLAIN, "int8")
    noncentrality = SAMPLES * ((f32 - int8) ** 2 / int8).sum()
    assert noncentrality > 100


def test_soft_q_for_argmax_drafts_is_caught(monkeypatch):
    """The known wrong rule (draft the mode, test it with the soft q) must fail this very test."""

    def choose_wrongly(config, logits_BV, request, key_B):
        probs_BV = chain.probabilities(logits_BV[:, None], request.sampling)[:, 0]
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), probs_BV

    monkeypatch.setattr(chain, "_choose", choose_wrongly)
    assert not _follows(_counts(Mode("thresholds")), _exact(PLAIN))


def test_a_q_at_the_wrong_ids_is_caught(monkeypatch):
    """The q of a trimmed head, left at its first K ids, must fail this very test."""

    def left_in_place(probs_BGU, ids_U, vocab_size):
        return jnp.pad(probs_BGU, ((0, 0), (0, 0), (0, vocab_size - len(ids_U))))

    monkeypatch.setattr(chain, "over_all_ids", left_in_place)
    assert not _follows(_counts(Mode("thresholds", trimmed=True)), _exact(PLAIN))


@pytest.mark.exhaustive("other faults are caught in every run")
def test_reranking_drawn_children_is_caught(monkeypatch):
    """Ranking drawn children by their own probability, as deterministic ones are, must fail this very test."""
    children = Growth.children

    def by_own_probability(*args):
        drawn = children(*args)
        possible = drawn.priority_BJk > -jnp.inf
        return drawn.replace(priority_BJk=jnp.where(possible, drawn.score_BJk, -jnp.inf))

    monkeypatch.setattr(Growth, "children", by_own_probability)
    assert not _follows(_counts(Mode("thresholds", tree=BY_LEVEL)), _exact(PLAIN))


@pytest.mark.exhaustive("other faults are caught in every run")
def test_a_q_that_keeps_its_sum_short_is_caught(monkeypatch):
    """q must be normalised again after each refusal: without that this very test fails."""
    norm = tree_acceptance._norm

    def of_p_only(weights_BV, otherwise_BV):
        return weights_BV if weights_BV is otherwise_BV else norm(weights_BV, otherwise_BV)

    monkeypatch.setattr(tree_acceptance, "_norm", of_p_only)
    assert not _follows(_counts(Mode("independent", tree=BY_LEVEL)), _exact(PLAIN))
