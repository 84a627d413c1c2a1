"""What stands before a text: one rule for BOS at every entry point, and tokens that a model has no embedding for."""

from __future__ import annotations

import dataclasses

import pytest
import transformers
from hf_tiny import expect_user_error
from tiny import tiny_model, tiny_tokenizer
from tokenizers import processors

from s2d_jax.cli.prompts import encode
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.text.tokenizer import Tokenizer

VOCAB = 300
BOS, EOS = "<|endoftext|>", "<|im_end|>"
MESSAGES = [{"role": "user", "content": "the dog"}]


def with_special_tokens(single: str) -> Tokenizer:
    """A tokenizer that puts these around a text: BOS is 0, EOS is 2."""
    backend = tiny_tokenizer(VOCAB)._fast.backend_tokenizer
    named = [(BOS, 0), (EOS, 2)]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=named)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS
    )
    return Tokenizer(fast)


@pytest.mark.parametrize("single", [f"{BOS} $A", f"{BOS} $A {EOS}"])
def test_a_text_begins_with_one_bos_and_ends_as_it_is(single):
    tokenizer = with_special_tokens(single)
    bare = tokenizer.encode("the dog")
    assert 0 not in bare
    assert tokenizer.encode_text("the dog") == [0, *bare]
    assert tokenizer.encode_text(f"{BOS}the dog") == [0, *bare]
    assert tokenizer.encode_text("") == [0]
    assert tokenizer.encode_text(f"the{BOS} dog")[:2] == [0, bare[0]]


@pytest.mark.parametrize("single", ["$A", f"$A {EOS}"])
def test_a_tokenizer_without_bos_adds_none(single):
    tokenizer = with_special_tokens(single)
    assert tokenizer.encode_text("the dog") == tokenizer.encode("the dog")
    assert tokenizer.encode_text(f"{BOS}the") == tokenizer.encode(f"{BOS}the")


@pytest.mark.parametrize("begun", ["", BOS])
def test_every_entry_point_keeps_the_rule(begun):
    tokenizer = with_special_tokens(f"{BOS} $A")
    model = dataclasses.replace(tiny_model(VOCAB, 1), tokenizer=tokenizer)
    text = f"{begun}the dog"
    expected = [0, *tokenizer.encode("the dog")]
    assert SpeculativeDecoder(model).encode(text) == expected
    assert encode(tokenizer, [{"role": "user", "content": text}], raw=True) == expected
    assert model.score(text)[0].token_ids == expected


def test_a_conversation_has_what_its_template_writes_and_no_more():
    tokenizer = with_special_tokens(f"{BOS} $A")
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}"
    expected = [0, *tokenizer.encode("the dog")]
    assert tokenizer.encode_chat(MESSAGES) == expected
    assert encode(tokenizer, MESSAGES, raw=False) == expected
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert tokenizer.encode_chat(MESSAGES) == expected[1:]


def test_a_token_without_an_embedding_is_named():
    """An added `<pad>` of id 300 beside an embedding of 300 rows, which would be read as the last one."""
    tokenizer = tiny_tokenizer(VOCAB)
    tokenizer._fast.add_tokens(["<pad>"], special_tokens=True)
    model = dataclasses.replace(tiny_model(VOCAB, 1), tokenizer=tokenizer)
    told = r"has token id 300 \('<pad>'\); the model's ids are 0 to 299"
    decoder = SpeculativeDecoder(model)
    for call in (decoder.generate, decoder.encode, model.score):
        with expect_user_error(told):
            call("the<pad>")
    with expect_user_error(told):
        decoder.generate([{"role": "user", "content": "the<pad>"}])
    for beyond in (-1, 2**32, 2**70):
        with expect_user_error(f"has token id {beyond}; the"):
            decoder.generate([1, beyond])
    with expect_user_error("has token id 300; the"):
        model.logits([1, 300])
