"""Directories whose tokenizer is a SentencePiece model alone, against SentencePiece itself."""

from __future__ import annotations

import io
import json

import pytest
import sentencepiece
from hf_tiny import expect_user_error
from test_tokenizer import TEXTS, assert_survives_saving

from s2d_jax.text.tokenizer import Tokenizer


def write_sentencepiece_model(directory):
    """Vicuna's and LLaMA-2's original form: tokenizer.model and small JSON files, no tokenizer.json."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    (directory / "config.json").write_text('{"model_type": "llama"}')
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, **special}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def test_a_directory_with_only_a_sentencepiece_model(tmp_path):
    theirs = write_sentencepiece_model(tmp_path)
    ours = Tokenizer.from_directory(tmp_path)
    # Special tokens in a text are recognised here; transformers gives a lone space one token less.
    texts = [text for text in TEXTS if text.strip() and "<s>" not in text]
    assert len(texts) > 20
    for text in texts:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == text
    assert ours.stop_token_ids == (theirs.eos_id(),)
    assert_survives_saving(ours, tmp_path / "saved", texts)


@pytest.mark.parametrize("damage", ["truncated", "tiktoken"])
def test_a_tokenizer_model_that_is_not_sentencepieces(tmp_path, damage, caplog):
    write_sentencepiece_model(tmp_path)
    file = tmp_path / "tokenizer.model"
    file.write_bytes(
        file.read_bytes()[:1000] if damage == "truncated" else b"IQ== 0\nIg== 1\nIw== 2\n"
    )
    with expect_user_error(
        r"tokenizer.model is no readable SentencePiece model \(.*\); fetch it again, or add the model's tokenizer"
    ):
        Tokenizer.from_directory(tmp_path)
    assert caplog.text == ""
