"""Logits and log-probabilities of texts that are there: those of Hugging Face, on torch."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_tiny import hf_logits, hf_model, random_tokens
from tiny import compilations, tiny_config, tiny_draft, tiny_tokenizer

from s2d_jax.errors import UserError
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.weights import score
from s2d_jax.weights.load import load_model
from s2d_jax.weights.model import Model
from s2d_jax.weights.prepare import prepare_for_decode

VOCAB = 300
TEXT = "the quick brown fox jumps"


@pytest.fixture(scope="module")
def torch_model():
    return hf_model(tiny_config(VOCAB, 2))


@pytest.fixture(scope="module")
def model(torch_model, tmp_path_factory) -> Model:
    directory = tmp_path_factory.mktemp("model")
    torch_model.save_pretrained(directory)
    return dataclasses.replace(load_model(directory), tokenizer=tiny_tokenizer(VOCAB))


def expected_log_probs(torch_model, ids) -> np.ndarray:
    """f32 `[T - 1]`."""
    logits_TV = torch.from_numpy(hf_logits(torch_model, np.array([ids], np.int32))[0])
    log_probs_TV = torch.log_softmax(logits_TV, dim=-1)[:-1]
    return log_probs_TV[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].numpy()


def test_logits_are_those_of_torch(model, torch_model):
    tokens_BT = random_tokens(VOCAB)
    expected_BTV = hf_logits(torch_model, tokens_BT)
    got_BTV = model.logits(tokens_BT)
    assert (got_BTV.shape, got_BTV.dtype) == ((2, 40, VOCAB), jnp.float32)
    np.testing.assert_allclose(got_BTV, expected_BTV, rtol=1e-4, atol=1e-4)
    rows = model.logits([jnp.asarray(tokens_BT[0]), tokens_BT[1].tolist()])
    np.testing.assert_array_equal(rows, got_BTV)
    for one in (tokens_BT[0].tolist(), tuple(tokens_BT[0]), jnp.asarray(tokens_BT[0])):
        got_TV = model.logits(one)
        assert got_TV.shape == (40, VOCAB)
        np.testing.assert_allclose(got_TV, expected_BTV[0], rtol=1e-4, atol=1e-4)
    with compilations() as compiled:
        assert model.logits(tokens_BT[:, :33]).shape == (2, 33, VOCAB)  # another length
    assert len(compiled) <= 1  # cutting off what filled it up


@pytest.mark.parametrize("length", [2, 32, 33, 150])
def test_scores_are_those_of_torch_in_chunks_of_any_number(model, torch_model, monkeypatch, length):
    monkeypatch.setattr(score, "_CHUNK", 32)
    ids = random_tokens(VOCAB, length, 1)[0].tolist()
    (got,) = model.score(ids)
    assert got.token_ids == ids
    expected = expected_log_probs(torch_model, ids)
    np.testing.assert_allclose(got.log_probs, expected, rtol=1e-4, atol=1e-4)
    assert got.total == pytest.approx(expected.sum(), rel=1e-4)
    assert got.perplexity == pytest.approx(math.exp(-expected.mean()), rel=1e-3)


def test_texts_and_lists_of_ids(model, torch_model):
    ids = model.tokenizer.encode(TEXT)
    (of_text,), (of_ids, other) = model.score(TEXT), model.score([np.array(ids), "one two"])
    assert of_text.token_ids == of_ids.token_ids == ids
    expected = expected_log_probs(torch_model, ids)
    np.testing.assert_allclose(of_text.log_probs, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(of_text.log_probs, of_ids.log_probs)
    assert other.token_ids == model.tokenizer.encode("one two")


def test_a_tokenizer_that_adds_bos_scores_the_whole_text(model, torch_model):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer(VOCAB)
    fast = tokenizer._fast
    fast.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", fast.bos_token_id)]
    )
    (got,) = dataclasses.replace(model, tokenizer=tokenizer).score(TEXT)
    assert got.token_ids == [fast.bos_token_id, *model.tokenizer.encode(TEXT)]
    assert len(got.log_probs) == len(model.tokenizer.encode(TEXT))
    expected = expected_log_probs(torch_model, got.token_ids)
    np.testing.assert_allclose(got.log_probs, expected, rtol=1e-4, atol=1e-4)


def test_a_single_token_has_nothing_to_score(model):
    (got,) = model.score([7])
    assert (len(got.log_probs), got.total, got.perplexity) == (0, 0.0, 1.0)
    assert repr(got) == "TextScore: 1 tokens, total 0.00, perplexity 1.00"


def test_the_logits_of_a_long_text_never_exist_at_once(model):
    def temporaries(width):
        tokens_BC, length_B = jnp.zeros((1, 1025), jnp.int32), jnp.ones(1, jnp.int32)
        arguments = model.transformer, model.params, tokens_BC, length_B, width
        compiled = score._log_probs.lower(*arguments).compile()
        assert (f"f32[1,1024,{VOCAB}]" in compiled.as_text()) == (width == 1024)
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(32) < 0.5 * temporaries(1024)


def test_int8_weights_and_numpy_parameters(model):
    tokens_BT = random_tokens(VOCAB)
    for kept in (model, prepare_for_decode(model, "int8")):
        on_host = dataclasses.replace(kept, params=jax.device_get(kept.params))
        np.testing.assert_array_equal(on_host.logits(tokens_BT), kept.logits(tokens_BT))
        np.testing.assert_array_equal(
            on_host.score(TEXT)[0].log_probs, kept.score(TEXT)[0].log_probs
        )
    decoded = SpeculativeDecoder(model).generate([5, 9, 2])
    assert model.logits([5, 9, 2])[-1].argmax() == decoded.token_ids[0][0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.logits([]), "there are no prompts; give at least one"),
        (lambda m: m.logits([1, 300]), "token id 300; the model's ids are 0 to 299"),
        (lambda m: m.logits("text"), "'text' is no list of token ids; encode it"),
        (lambda m: m.logits([[1], [2, 3]]), "rows of 1 to 2 tokens have no logits in one array"),
        (lambda m: m.logits(np.zeros(3)), "is no prompt; give"),
        (lambda m: m.logits([1] * 257), "257 tokens, more than the model's context of 256"),
        (lambda m: m.score(""), "the prompt is empty: it gives no token; give at least one"),
        (lambda m: m.score(3), r"3 \(int\) is no prompt"),
        (lambda m: m.score([{"role": "user", "content": "x"}]), "is a conversation; score its text"),
        (lambda m: tiny_draft().score("x"), "'x' is text, but the model has no tokenizer"),
    ],
)  # fmt: skip
def test_bad_requests_say_what_is_wrong(model, call, message):
    with pytest.raises(UserError, match=message) as caught:
        call(model)
    assert "\n" not in str(caught.value)
