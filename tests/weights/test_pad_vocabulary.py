"""Exports with a longer vocabulary: new rows are those of an unused token, and Hugging Face takes them as assistants."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import torch
import transformers
from exported import VOCABULARY, hf_load, make_draft
from hf_tiny import expect_user_error, hf_logits, hf_model, random_tokens
from infer_tiny import failing_run
from tiny import tiny_config, with_parts

from infer.export import main as export
from s2d_jax.config.draft import ExitParts
from s2d_jax.weights.export import export_draft
from s2d_jax.weights.load import load_draft
from s2d_jax.weights.model import Draft
from s2d_jax.weights.pad_vocabulary import pad_vocabulary, unused_token

LONGER = VOCABULARY + 18
UNUSED = 1  # <|im_start|>, the only special token of the tiny tokenizer that ends no text


def changed_tables(draft: Draft, padded: Draft) -> set[str]:
    return {name for name in draft.params if draft.params[name] is not padded.params[name]}


@pytest.mark.parametrize("name", ["llama", "llama tied"])
def test_new_rows_are_those_of_an_unused_token(name):
    draft = with_parts(make_draft(name), ExitParts(heads=(1, 4)))
    padded = pad_vocabulary(draft, LONGER)
    assert padded.config == dataclasses.replace(draft.config, vocab_size=LONGER)
    for name in changed_tables(draft, padded):
        (before_VD,), (after_VD,) = (jax.tree.leaves(each.params[name]) for each in (draft, padded))
        assert after_VD.shape == (LONGER, draft.config.embed_dim)
        np.testing.assert_array_equal(after_VD[:VOCABULARY], before_VD)
        for row_D in after_VD[VOCABULARY:]:
            np.testing.assert_array_equal(row_D, before_VD[UNUSED])
    heads = {"exit_heads_1", "exit_heads_4"}
    own = {"embed"} if draft.config.tie_embeddings else {"embed", "lm_head"}
    assert changed_tables(draft, padded) == heads | own


def test_huggingface_takes_it_as_an_assistant(tmp_path):
    """As it is, transformers refuses a draft of another size; padded, it speeds up the same text."""
    draft = make_draft("llama")
    export_draft(draft, tmp_path / "short", {})
    export_draft(pad_vocabulary(draft, LONGER), tmp_path / "long", {})
    target = hf_model(tiny_config(LONGER, num_layers=2), seed=3)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "long")
    prompt = tokenizer("the quick brown", return_tensors="pt")
    limits = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    plain = target.generate(**prompt, **limits)
    with pytest.raises(ValueError, match="tokenizer"):
        target.generate(**prompt, **limits, assistant_model=hf_load(tmp_path / "short"))
    for directory in (tmp_path / "long", tmp_path / "long" / "exit_02"):
        assistant = hf_load(directory)
        assert assistant.config.vocab_size == LONGER
        assert torch.equal(target.generate(**prompt, **limits, assistant_model=assistant), plain)
    tokens_BT = random_tokens(VOCABULARY)
    short, long = (hf_logits(hf_load(tmp_path / d), tokens_BT) for d in ("short", "long"))
    np.testing.assert_allclose(long[..., :VOCABULARY], short, atol=1e-5)


def test_it_is_loaded_again(tmp_path):
    padded = pad_vocabulary(make_draft("qwen2 tied"), LONGER)
    export_draft(padded, tmp_path / "out", {})
    loaded = load_draft(tmp_path / "out")
    assert loaded.config == padded.config
    jax.tree.map(np.testing.assert_array_equal, loaded.params, padded.params)


def test_the_row_that_is_copied():
    tokenizer = make_draft().tokenizer
    assert unused_token(tokenizer, VOCABULARY, "tiny") == UNUSED
    # Rows behind the tokenizer's last token stand for nothing at all.
    assert unused_token(tokenizer, VOCABULARY + 5, "tiny") == VOCABULARY + 4
    with expect_user_error("tiny has no token that is known to be unused"):
        unused_token(None, VOCABULARY, "tiny")
    with expect_user_error("tiny has no token that is known to be unused"):
        unused_token(tokenizer, 1, "tiny")


def test_sizes():
    draft = make_draft()
    assert pad_vocabulary(draft, VOCABULARY) is draft
    for size in (VOCABULARY - 1, 0, 2 * VOCABULARY + 1, 10**12):
        with expect_user_error(
            f"a vocabulary of 270 cannot be padded to {size}; give the vocabulary of the target, 270 to 540"
        ):
            pad_vocabulary(draft, size)


def test_a_part_is_not_padded(tmp_path, monkeypatch, capsys):
    flags = ("--run", tmp_path, "--out", tmp_path / "out", "--adapters-only", "--pad-vocabulary", 9)
    line = failing_run(export, monkeypatch, capsys, *flags)
    assert line.startswith("error: --pad-vocabulary needs the whole draft, and --adapters-only")
