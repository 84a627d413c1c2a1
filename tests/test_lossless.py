"""Sampled output follows the target's distribution exactly: chi-square against enumeration, in every drafting mode.

False-alarm rate: each of the modes is tested at ALPHA / number of modes (Bonferroni), so a correct decoder fails the whole file
with probability at most ALPHA; seeds are fixed, so it then fails always or never.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_sampling import filtered
from numpy_transformer import all_depths, logits
from scipy import stats
from tiny import enumerable_draft, enumerable_model, with_parts

from s2d_jax import generation, linear, tree_acceptance
from s2d_jax.config import DecodeConfig, ExitParts, RoundCosts, SamplingParams, TreeShape
from s2d_jax.decoder import Decoder, Target
from s2d_jax.draft_length import DraftingArrays
from s2d_jax.draft_vocabulary import DraftVocabulary
from s2d_jax.drafters import IndependentDrafter, NoDrafter, SortedDrafter, chain
from s2d_jax.drafters.chain import ChainConfig
from s2d_jax.drafters.segments import Segments
from s2d_jax.generation import SpeculativeDecoder
from s2d_jax.model import Transformer
from s2d_jax.prepare import prepare_for_decode
from s2d_jax.pretrained import with_trimmed_head
from s2d_jax.proposal import Request, SamplingArrays
from s2d_jax.tree_growth import Growth

SAMPLES, BATCH = 200_000, 10_000
ALPHA = 1e-4
VOCAB, EMITTED, WIDTH = 8, 3, 2
PROMPT = (3, 1, 4, 1, 5)
LISTED = (0, 2, 3, 6, 7)  # of a trimmed head
PARTS = ExitParts(heads=(1, 3), adapters=(1, 2), adapter_rank=4)  # of exits 1, 2, 3

# Two levels, so that the third emitted token is a bonus token where both are accepted.
NARROW = TreeShape(depth=2, top_k=2, nodes=5)
BY_LEVEL = TreeShape(depth=2, top_k=3, nodes=7)
BY_NODE = dataclasses.replace(BY_LEVEL, leaving="node")
STATIC = TreeShape.static(((0, 0), (0, 1), (1, 0), (2,)))
STATIC_BY_NODE = dataclasses.replace(STATIC, leaving="node")
GAPPED = TreeShape.static(((1,), (2, 0), (2, 2)))  # without the most probable child
TREES = {
    NARROW: "narrow",
    BY_LEVEL: "tree",
    BY_NODE: "tree by node",
    STATIC: "static",
    STATIC_BY_NODE: "static by node",
    GAPPED: "gapped static",
}

PLAIN = SamplingParams(temperature=1.0)
FILTERED = SamplingParams(temperature=0.8, top_k=6, top_p=0.9, min_p=0.03)


@dataclasses.dataclass(frozen=True)
class Mode:
    policy: str  # none, independent, fixed, thresholds
    sampled: bool = True
    rule: str = "fixed"
    guarded: bool = False
    sampling: SamplingParams = PLAIN
    target_format: str = "f32"
    draft_format: str = "f32"
    trimmed: bool = False
    parts: bool = False
    tree: TreeShape | None = None

    def __str__(self):
        how = TREES[self.tree] if self.tree else self.rule
        parts = [self.policy, "sampled" if self.sampled else "argmax", how]
        parts += ["trimmed"] * self.trimmed + ["guarded"] * self.guarded + ["parts"] * self.parts
        parts += ["filtered"] * (self.sampling is FILTERED)
        formats = (self.target_format, self.draft_format)
        return "-".join([*parts, *(formats if formats != ("f32", "f32") else ())])

    @property
    def num_exits(self) -> int:
        return 3 if self.policy == "thresholds" else 1

    def config(self) -> DecodeConfig:
        """At these costs rounds of no, one and two tokens all occur."""
        needs_costs = self.guarded or self.rule == "expected_gain"
        costs = RoundCosts((0.25, 0.3, 0.35)[: self.num_exits], (1.0, 1.5, 1.8), 0.02)
        if self.tree is not None:
            return DecodeConfig(
                exits={"independent": (3,), "fixed": (1,), "thresholds": None}[self.policy],
                tree=self.tree,
                draft_sampling="sample" if self.sampled else "argmax",
                costs=costs if needs_costs else None,
                guard=self.guarded,
                catch_up_width=2,
            )
        return DecodeConfig(
            # A first draft of one token makes the third emitted token a bonus token.
            num_draft_tokens=1 if self.rule == "heuristic" else WIDTH,
            max_draft_tokens=WIDTH,
            draft_length_rule=self.rule,
            min_confidence=0.45,
            costs=costs if needs_costs else None,
            guard=self.guarded,
            narrow_widths=(1, 2) if needs_costs or self.rule == "confidence" else (),
        )


MODES = [
    Mode("none"),
    Mode("none", sampling=FILTERED),
    *(
        Mode(policy, sampled)
        for policy in ("independent", "fixed", "thresholds")
        for sampled in (True, False)
    ),
    *(Mode("thresholds", sampled, sampling=FILTERED) for sampled in (True, False)),
    *(Mode("thresholds", sampled, "heuristic") for sampled in (True, False)),
    Mode("fixed", rule="heuristic", sampling=FILTERED),
    *(Mode("independent", sampled, "confidence") for sampled in (True, False)),
    Mode("thresholds", rule="confidence", sampling=FILTERED),
    *(Mode("thresholds", sampled, "expected_gain", parts=sampled) for sampled in (True, False)),
    Mode("independent", rule="expected_gain"),
    Mode("independent", guarded=True),
    Mode("thresholds", rule="expected_gain", guarded=True),
    Mode("thresholds", sampled=False, rule="confidence", guarded=True, sampling=FILTERED),
    Mode("thresholds", target_format="int8", draft_format="bf16"),
    Mode("independent", False, target_format="int8", draft_format="int8"),
    Mode("thresholds", sampling=FILTERED, draft_format="int8"),
    *(
        Mode(policy, sampled, trimmed=True)
        for policy in ("independent", "thresholds")
        for sampled in (True, False)
    ),
    Mode("thresholds", sampling=FILTERED, trimmed=True, parts=True),
    Mode("independent", tree=NARROW),
    Mode("independent", False, tree=STATIC, sampling=FILTERED),
    Mode("fixed", tree=BY_LEVEL, sampling=FILTERED),
    Mode("fixed", False, tree=NARROW),
    Mode("thresholds", tree=BY_LEVEL),
    Mode("thresholds", tree=BY_NODE, sampling=FILTERED, trimmed=True),
    Mode("thresholds", False, tree=BY_LEVEL, trimmed=True),
    Mode("thresholds", False, tree=STATIC_BY_NODE, target_format="int8", draft_format="int8"),
    Mode("thresholds", tree=BY_NODE, guarded=True, parts=True),
    Mode("independent", tree=STATIC),
    Mode("independent", tree=GAPPED),
    Mode("independent", False, tree=BY_LEVEL, guarded=True),
]


def _all_modes() -> list[Mode]:
    """Every combination of drafter, way of drafting, rule, guard, head, filters and formats that NumPy can judge.

    A bf16 target computes in bf16, so its distribution is not that of the enumeration: `test_weight_formats.py` has its tokens.
    """
    speculative = itertools.product(
        ("independent", "fixed", "thresholds"),
        *((True, False), ("fixed", "heuristic", "confidence", "expected_gain"), (False, True)),
        *((PLAIN, FILTERED), ("f32", "int8"), ("f32", "bf16", "int8"), (False, True)),
        (False, True),
    )
    trees = itertools.product(
        *(("independent", "fixed", "thresholds"), (True, False), ("fixed",), (False, True)),
        *((PLAIN, FILTERED), ("f32", "int8"), ("f32", "int8"), (False, True), (False, True)),
        (BY_LEVEL, BY_NODE, STATIC, STATIC_BY_NODE, GAPPED),
    )
    plain = itertools.product((PLAIN, FILTERED), ("f32", "int8"))
    return [
        *(Mode("none", sampling=sampling, target_format=kept) for sampling, kept in plain),
        *(Mode(*choice) for choice in speculative),
        *(Mode(*choice) for choice in trees),
    ]


def _judged(config) -> list[Mode]:
    return _all_modes() if config.getoption("--all-modes") else MODES


def pytest_generate_tests(metafunc):
    if "mode" in metafunc.fixturenames:
        metafunc.parametrize("mode", _judged(metafunc.config), ids=str)


def _decoder(mode: Mode, target, draft) -> Decoder:
    if mode.tree is not None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(generation, "_RETURN_WIDTH", 3)
            return SpeculativeDecoder(target, draft, mode.config())._decoder(greedy=False)
    watched = mode.rule in ("confidence", "expected_gain")
    config = ChainConfig(WIDTH, VOCAB, greedy=False, sampled=mode.sampled, watched=watched)
    model = draft.drafting_transformer
    exits, back = draft.draft_config.exit_layers, 3 if mode.guarded else 0
    drafter = {
        "none": NoDrafter(0),
        "independent": IndependentDrafter(model, config, back),
        "fixed": SortedDrafter(Segments(model, (1,), VOCAB), config, 2, back),
        "thresholds": SortedDrafter(Segments(model, exits, VOCAB), config, 2, back),
    }[mode.policy]
    widths = (1,) if mode.policy == "none" else mode.config().verify_widths
    return Decoder(Target(Transformer(target.config, target.dtype)), drafter, False, widths)


@functools.cache
def _models():
    # A spread of 14 gives logits of standard deviation 1.5: distributions that differ, with confidences from .2 to .9.
    return enumerable_model(seed=0, spread=14.0), enumerable_draft((1, 2, 3), seed=1, spread=14.0)


def _emitted_counts(mode: Mode) -> np.ndarray:
    """Counts `[8, 8, 8]` of the first three tokens of 200,000 continuations."""
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
    tokens_BC = jnp.zeros((BATCH, capacity), jnp.int32).at[:, :width].set(jnp.array([PROMPT]))
    length_B = jnp.full((BATCH,), width, jnp.int32)

    @jax.jit
    def generate(params, first_seed):
        request = Request(
            sampling=SamplingArrays.stack([mode.sampling] * BATCH),
            key_B=jax.vmap(jax.random.key)(first_seed + jnp.arange(BATCH, dtype=jnp.uint32)),
            # Room for one more, so that the first round may draft at its full length.
            max_length_B=length_B + EMITTED + 1,
            stop_ids_BN=jnp.full((BATCH, 1), -1, jnp.int32),
            exit_threshold_E=jnp.array([0.55, 0.6, 0.0][: mode.num_exits]),
            max_rounds=jnp.int32(100),
            drafting=_drafting(mode, decoder.drafter.width),
            vocabulary_K=jnp.array(LISTED) if mode.trimmed else None,
        )
        state = decoder.prefill(params, request, tokens_BC, length_B, width)
        state = decoder.run(params, request, state)
        counters = decoder.drafter.stats(state.draft_state)
        counters |= {"rounds": state.rounds_B, "plain_rounds": state.guard.plain_rounds_B}
        return state.tokens_BC[:, width : width + EMITTED], counters

    counts = np.zeros((VOCAB,) * EMITTED, np.int64)
    for call in range(SAMPLES // BATCH):
        emitted, drafted = jax.device_get(generate(params, jnp.uint32(call * BATCH)))
        np.add.at(counts, tuple(emitted.T), 1)
    if mode.policy == "thresholds":  # the test means nothing unless every exit is used
        assert (drafted["exit_counts"].sum(axis=0) > 0.03 * drafted["exit_counts"].sum()).all()
    if mode.guarded or mode.rule == "expected_gain":  # ... and rounds both with and without drafts
        assert 0.05 < drafted["plain_rounds"].sum() / drafted["rounds"].sum() < 0.95
    return counts


def _drafting(mode: Mode, width: int) -> DraftingArrays:
    # Rows start with credits of many sizes, and spend them: plain rounds come before and after drafted ones.
    credits = np.arange(BATCH) % 50 / 10 if mode.guarded else np.full(BATCH, np.inf)
    return DraftingArrays.create(mode.config(), credits, width, mode.num_exits)


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


def test_emitted_tokens_follow_the_target(mode, monkeypatch, request):
    # The form that small batches use, for this large one.
    monkeypatch.setattr(linear, "_FEW_DIGIT_ROWS", BATCH * WIDTH * len(PROMPT))
    exact = _exact(mode.sampling, mode.target_format)
    assert _p_value(_emitted_counts(mode), exact) > ALPHA / len(_judged(request.config))


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
    assert _p_value(_emitted_counts(Mode("thresholds")), _exact(PLAIN)) < ALPHA / len(MODES)


def test_a_q_at_the_wrong_ids_is_caught(monkeypatch):
    """The q of a trimmed head, left at its first K ids, must fail this very test."""

    def left_in_place(probs_BGK, ids_K, vocab_size):
        return jnp.pad(probs_BGK, ((0, 0), (0, 0), (0, vocab_size - len(ids_K))))

    monkeypatch.setattr(chain, "over_all_ids", left_in_place)
    counts = _emitted_counts(Mode("thresholds", trimmed=True))
    assert _p_value(counts, _exact(PLAIN)) < ALPHA / len(MODES)


def test_reranking_drawn_children_is_caught(monkeypatch):
    """Ranking drawn children by their own probability, as deterministic ones are, must fail this very test."""
    children = Growth.children

    def by_own_probability(*args):
        drawn = children(*args)
        possible = drawn.priority_BRk > -jnp.inf
        return drawn.replace(priority_BRk=jnp.where(possible, drawn.score_BRk, -jnp.inf))

    monkeypatch.setattr(Growth, "children", by_own_probability)
    counts = _emitted_counts(Mode("thresholds", tree=BY_LEVEL))
    assert _p_value(counts, _exact(PLAIN)) < ALPHA / len(MODES)


def test_a_q_that_keeps_its_sum_short_is_caught(monkeypatch):
    """q must be normalised again after each refusal: without that this very test fails."""
    norm = tree_acceptance._norm

    def of_p_only(weights_BV, otherwise_BV):
        return weights_BV if weights_BV is otherwise_BV else norm(weights_BV, otherwise_BV)

    monkeypatch.setattr(tree_acceptance, "_norm", of_p_only)
    counts = _emitted_counts(Mode("independent", tree=BY_LEVEL))
    assert _p_value(counts, _exact(PLAIN)) < ALPHA / len(MODES)
