"""Directories whose tokenizer is a SentencePiece model alone, against SentencePiece itself."""

from __future__ import annotations

import pytest
from hard_texts import TEXTS
from hf_tiny import expect_user_error
from sentencepiece_model import write_sentencepiece_model
from test_tokenizer import assert_survives_saving

from s2d_jax.text.tokenizer import Tokenizer


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
