"""A draft whose head is read over a list of tokens: the definition in NumPy, greedy identity, export, meshes."""

from __future__ import annotations

import dataclasses
import filecmp

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_transformer import all_depths, logits
from tiny import noisy_draft, tiny_draft, tiny_model, tiny_tokenizer

from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.config.tree import TreeShape
from s2d_jax.draft.chain import ChainConfig, propose_chain
from s2d_jax.draft.length import DraftingArrays, confidence
from s2d_jax.draft.logits import fit_draft_logits
from s2d_jax.draft.request import Request
from s2d_jax.errors import UserError
from s2d_jax.generation import checks as pairing
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.model.params import logical_axes
from s2d_jax.model.transformer import Transformer
from s2d_jax.sampling import SamplingArrays
from s2d_jax.sharding import MeshConfig, make_mesh, params_sharding
from s2d_jax.weights.export import export_draft
from s2d_jax.weights.load import load_draft, load_model
from s2d_jax.weights.model import Draft, Model, with_trimmed_head
from s2d_jax.weights.vocabulary import TRIMMED_HEAD, DraftVocabulary

PROMPTS = [[5, 9, 2], [7, 7, 1, 3, 30, 12, 50], [33, 4, 21, 60, 2], [1]]
GREEDY = SamplingParams(max_new_tokens=30)
SAMPLED = SamplingParams(temperature=1.0, max_new_tokens=30)
LISTED = DraftVocabulary(np.delete(np.arange(64), [3, 16, 17, 40, 55]))


def _noisy(target: Model) -> Draft:
    if target.config.num_layers == 2:
        return noisy_draft(target, (1, 2), (0.4, 0.0))
    return noisy_draft(target, (1, 2, 4), (0.4, 0.4, 0.0))


def _target(num_layers=4, **changes) -> Model:
    return tiny_model(num_layers=num_layers, spread=14.0, **changes)


@pytest.fixture(scope="module")
def target() -> Model:
    return _target()


@pytest.fixture(scope="module")
def draft(target) -> Draft:
    return _noisy(target)


@pytest.fixture(scope="module")
def small() -> tuple[Model, Draft]:
    """Two layers, for what does not depend on depth."""
    target = _target(2)
    return target, _noisy(target)


@pytest.mark.parametrize("tied", [False, True])
def test_every_exit_reads_the_listed_rows_of_the_head(tied):
    draft = _noisy(_target(tie_embeddings=tied))
    trimmed = with_trimmed_head(draft, LISTED)
    model = Transformer(draft.config, trimmed_head_size=LISTED.size)
    tokens = [5, 9, 2, 44]
    states, *_ = all_depths(draft.config, jax.tree.map(np.asarray, draft.params), tokens)
    apply = jax.jit(model.apply, static_argnames=("exit_layers", "method"))
    variables = {"params": trimmed.params}
    hiddens = apply(variables, jnp.array([tokens]), exit_layers=(1, 2, 4), method="exit_hiddens")
    for depth, h_1TD in zip((1, 2, 4), hiddens, strict=True):
        expected = logits(draft.config, draft.params, states[depth])[:, LISTED.ids_U]
        found = apply(variables, h_1TD, method="logits")[0]
        assert found.shape == (4, LISTED.size)
        np.testing.assert_allclose(found, expected, atol=1e-3, rtol=1e-4)


def _request(rows, ids) -> Request:
    B = len(rows)
    return Request(
        sampling=SamplingArrays.stack(rows),
        key_B=jax.vmap(jax.random.key)(jnp.arange(B)),
        max_length_B=jnp.full(B, 99, jnp.int32),
        stop_ids_BZ=jnp.full((B, 1), -1, jnp.int32),
        exit_threshold_E=jnp.zeros(1),
        max_rounds=jnp.int32(100),
        drafting=DraftingArrays.create(DecodeConfig(), [np.inf] * B, 2, 1),
        vocabulary_U=jnp.array(ids, jnp.int32),
    )


@pytest.mark.parametrize("sampled", [True, False])
def test_the_proposal_by_its_definition(sampled):
    """q is the softmax over the list and 0 elsewhere; id 9, which the target lacks, is never drafted."""
    ids, V, B = [1, 4, 6, 9], 8, 300
    raw_U = np.array([0.3, 1.0, -0.5, 4.0], np.float32)
    expected_V = np.zeros(V)
    expected_V[ids[:3]] = np.exp(raw_U[:3]) / np.exp(raw_U[:3]).sum()
    config = ChainConfig(2, V, greedy=False, sampled=sampled)
    request = _request([SamplingParams(temperature=1.0)] * B, ids)

    def step(state, tokens_BC, end_B, live_B):
        logits_BU = fit_draft_logits(jnp.tile(raw_U, (B, 1)), V, request)
        return logits_BU, jnp.zeros(B, jnp.int32), state

    lengths_B, num_draft_B = jnp.ones(B, jnp.int32), jnp.full(B, 2, jnp.int32)
    tokens_BC = jnp.zeros((B, 8), jnp.int32)
    proposal, _ = propose_chain(
        *(config, step, (), tokens_BC, lengths_B, num_draft_B, request.key_B, request)
    )
    if not sampled:
        assert proposal.draft_probs_BGV is None
        assert (proposal.tokens_BG == 4).all()
        return
    assert set(np.unique(proposal.tokens_BG)) == {1, 4, 6}
    q_BGV = np.asarray(proposal.draft_probs_BGV)
    np.testing.assert_allclose(q_BGV, np.broadcast_to(expected_V, (B, 2, V)), atol=1e-6)
    assert (q_BGV[:, :, [0, 2, 3, 5, 7]] == 0).all()
    unsure = fit_draft_logits(jnp.array(raw_U)[None], V, request)
    assert float(confidence(unsure)[0]) == pytest.approx(expected_V.max(), abs=1e-6)


POLICIES = {
    "s2d": DecodeConfig(),
    "s2d heuristic": DecodeConfig(
        draft_length_rule="heuristic", num_draft_tokens=3, max_draft_tokens=5
    ),
    "sd@2": DecodeConfig(exits=(2,)),
    "independent": DecodeConfig(exits=(4,)),
}


OTHERS = pytest.mark.exhaustive("each head is in the rest, with one exit and with several")


@pytest.mark.parametrize(
    ("policy", "batch", "tied"),
    [
        *(("s2d", 4, True), ("independent", 4, False)),
        *(pytest.param(*case, marks=OTHERS) for case in (("s2d", 1, False), ("sd@2", 4, False))),
        pytest.param("s2d heuristic", 4, True, marks=OTHERS),
        pytest.param(
            *("s2d", 4, False),
            marks=pytest.mark.exhaustive("one row of it is there, and four that are tied"),
        ),
    ],
)
def test_greedy_equals_the_width_matched_reference(policy, batch, tied):
    target = _target(tie_embeddings=tied)
    draft = _noisy(target)
    decoder = SpeculativeDecoder(target, with_trimmed_head(draft, LISTED), POLICIES[policy])
    reference = SpeculativeDecoder(target, None, DecodeConfig(verify_width=decoder.verify_width))
    result = decoder.generate(PROMPTS[:batch], GREEDY)
    assert result.token_ids == reference.generate(PROMPTS[:batch], GREEDY).token_ids
    assert result.stats.accepted_tokens > 0
    unlisted = set(range(64)) - set(LISTED.ids_U.tolist())
    # The list matters here: the target writes tokens that the draft cannot propose.
    assert batch == 1 or unlisted & {i for ids in result.token_ids for i in ids}


@pytest.mark.exhaustive("lists of some tokens are tested by definition and by the tokens they give")
def test_a_list_of_all_tokens_changes_nothing(small):
    target, draft = small
    sampling = [GREEDY, SAMPLED, SAMPLED, SAMPLED]
    everything = with_trimmed_head(draft, DraftVocabulary(np.arange(64)))
    whole = SpeculativeDecoder(target, draft).generate(PROMPTS, sampling)
    listed = SpeculativeDecoder(target, everything).generate(PROMPTS, sampling)
    assert listed.token_ids == whole.token_ids
    assert listed.stats.exit_histogram == whole.stats.exit_histogram
    assert listed.stats.accepted_tokens == whole.stats.accepted_tokens


def test_another_list_of_the_same_size_compiles_nothing(small):
    target, draft = small
    config = DecodeConfig(num_draft_tokens=4)
    other = DraftVocabulary(np.arange(64 - LISTED.size, 64))
    answers = []
    for number, listed in enumerate((LISTED, other)):
        decoder = SpeculativeDecoder(target, with_trimmed_head(draft, listed), config)
        result = decoder.generate(PROMPTS, SAMPLED)
        answers.append(result.stats.accepted_tokens)
        assert number == 0 or result.stats.seconds["compile"] == 0
    assert answers[0] != answers[1]


@pytest.mark.parametrize("tied", [False, True])
def test_the_list_can_be_replaced_and_taken_away(tied):
    draft = _noisy(_target(tie_embeddings=tied))
    trimmed = with_trimmed_head(draft, LISTED)
    again = with_trimmed_head(trimmed, DraftVocabulary(np.array([1, 63])))
    head = draft.params["embed"]["embedding"] if tied else draft.params["lm_head"]["kernel"]
    np.testing.assert_array_equal(again.params[TRIMMED_HEAD]["kernel"], head[jnp.array([1, 63])])
    whole = with_trimmed_head(again, None)
    assert whole.vocabulary is None
    assert jax.tree.structure(whole.params) == jax.tree.structure(draft.params)


def test_a_trimmed_draft_as_target_keeps_its_whole_head(draft):
    plain = SpeculativeDecoder(draft).generate(PROMPTS, GREEDY)
    trimmed = SpeculativeDecoder(with_trimmed_head(draft, LISTED)).generate(PROMPTS, GREEDY)
    assert trimmed.token_ids == plain.token_ids


@pytest.mark.exhaustive("test_decoder.py has tables of both sizes without a list")
@pytest.mark.parametrize("vocab_size", [56, 80])
def test_vocabularies_that_are_padded_differently(vocab_size, monkeypatch):
    """Tiny models have no tokenizers that could show that only padding differs."""
    monkeypatch.setattr(pairing, "_check_vocabularies", lambda target, draft: None)
    target = _target(2)
    other = tiny_draft(vocab_size, (1, 2), spread=6.0)
    listed = DraftVocabulary(np.arange(1, vocab_size, 2))
    decoder = SpeculativeDecoder(target, with_trimmed_head(other, listed))
    reference = SpeculativeDecoder(target, None, DecodeConfig(verify_width=decoder.verify_width))
    ids = decoder.generate(PROMPTS, [GREEDY, GREEDY, SAMPLED, SAMPLED]).token_ids
    assert ids[:2] == reference.generate(PROMPTS, GREEDY).token_ids[:2]
    assert max(map(max, ids)) < 64


@pytest.mark.exhaustive("test_exit_parts has the same with parts of exits and adapters as well")
def test_tokens_beside_a_sharded_target_equal_those_of_one_device():
    """The list's size, 59, divides by no mesh; a draft that was split itself gives the same head."""
    sampling = [GREEDY, SAMPLED, SAMPLED, SAMPLED]
    target = _target(2, num_heads=8, num_kv_heads=8)
    draft = _noisy(target)
    one = SpeculativeDecoder(target, with_trimmed_head(draft, LISTED)).generate(PROMPTS, sampling)
    mesh = make_mesh(MeshConfig(tensor=4))
    shardings = params_sharding(target.config, logical_axes(target.config), mesh)
    split_target, split_draft = (
        dataclasses.replace(model, params=jax.device_put(model.params, shardings))
        for model in (target, draft)
    )
    decoder = SpeculativeDecoder(split_target, with_trimmed_head(split_draft, LISTED))
    many = decoder.generate(PROMPTS, sampling)
    assert many.token_ids == one.token_ids
    assert many.stats.exit_histogram == one.stats.exit_histogram


@pytest.mark.parametrize("tied", [False, True])
def test_an_export_keeps_the_list_and_whole_weights(tied, tmp_path):
    draft = _noisy(_target(tie_embeddings=tied))
    listed = DraftVocabulary(LISTED.ids_U, None, {"answers": ["a.jsonl"]})
    export_draft(with_trimmed_head(draft, listed), tmp_path / "trimmed", {})
    export_draft(draft, tmp_path / "whole", {})
    for name in ("model.safetensors", "config.json", "exit_01/model.safetensors"):
        assert filecmp.cmp(tmp_path / "trimmed" / name, tmp_path / "whole" / name, shallow=False)
    loaded = load_draft(tmp_path / "trimmed")
    assert loaded.vocabulary.to_json() == listed.to_json()
    expected = with_trimmed_head(draft, listed).params
    jax.tree.map(np.testing.assert_array_equal, loaded.params, expected)
    assert TRIMMED_HEAD not in load_model(tmp_path / "trimmed").params
    assert load_draft(tmp_path / "trimmed" / "exit_01").vocabulary is None


def test_lists_that_do_not_fit(target, draft):
    with pytest.raises(UserError, match="lists id 64, the draft has 64 tokens"):
        with_trimmed_head(draft, DraftVocabulary(np.array([0, 64])))
    of_another = DraftVocabulary.of_tokenizer([0, 5], tiny_tokenizer(64, texts=("zzz zz",)), {})
    named = dataclasses.replace(draft, tokenizer=tiny_tokenizer(64))
    with pytest.raises(UserError, match="was made for another tokenizer"):
        with_trimmed_head(named, of_another)
    wide = with_trimmed_head(tiny_draft(80, (1, 2)), DraftVocabulary(np.array([64, 70])))
    with pytest.raises(UserError, match="starts at id 64, the target has 64 tokens"):
        SpeculativeDecoder(target, wide)


def test_a_tree_of_more_children_than_the_draft_knows(small):
    target, draft = small
    trimmed = with_trimmed_head(draft, DraftVocabulary(np.array([3, 5, 9])))
    config = DecodeConfig(tree=TreeShape(depth=2, top_k=4, nodes=8))
    with pytest.raises(UserError, match="top_k=4 of the tree is more than the 3 tokens that the"):
        SpeculativeDecoder(target, trimmed, config)
    full = DecodeConfig(tree=TreeShape(depth=2, top_k=3, nodes=8))
    decoder = SpeculativeDecoder(target, trimmed, full)
    reference = SpeculativeDecoder(target, None, DecodeConfig(verify_width=decoder.verify_width))
    got = decoder.generate(PROMPTS, GREEDY).token_ids
    assert got == reference.generate(PROMPTS, GREEDY).token_ids
