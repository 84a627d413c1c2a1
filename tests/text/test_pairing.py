"""Whether two tokenizers are the same: their entries, and what they make of texts."""

from __future__ import annotations

import json

import pytest
import tokenizers
import transformers
from hf_tiny import expect_user_error
from tiny import tiny_tokenizer
from tokenizers import normalizers, pre_tokenizers

from s2d_jax.text.pairing import behaviour_hash, check_same_tokenizer
from s2d_jax.text.tokenizer import Tokenizer


def word_tokenizer(words, special: tuple[str, ...] = ()) -> Tokenizer:
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a")
    backend = tokenizers.Tokenizer(model)
    backend.add_special_tokens(list(special))
    return Tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=backend))


def changed(tokenizer: Tokenizer, change) -> Tokenizer:
    """The tokenizer with `change(backend)` done to its pipeline; its entries stay."""
    backend = tokenizers.Tokenizer.from_str(tokenizer._fast.backend_tokenizer.to_str())
    change(backend)
    return Tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=backend))


def test_same_tokenizer():
    base = word_tokenizer(["a", "b", "c"])
    assert check_same_tokenizer(base, word_tokenizer(["a", "b", "c"])) == []
    padded = word_tokenizer(["a", "b", "c", "[PAD3]", "<|reserved_special_token_0|>"])
    assert check_same_tokenizer(padded, base) == []
    assert check_same_tokenizer(base, padded) == []


PADDING = (
    *("<pad>", "[PAD]", "[PAD151665]", "<|pad|>", "<|padding|>", "[unused12]", "<unused3>"),
    *("<|dummy_85|>", "<dummy32000>", "<|reserved_special_token_3|>", "<|reserved_token_id_7|>"),
    *("<|extra_0|>", "<extra_id_0>", "<|placeholder1|>"),
)
WORDS = (
    *("Ġextraordinary", "Ġpadding", "pad", "extra", "▁unused", "Ġdummy", "reserved", "[padding"),
    *("<|im_pad_end|>", "<paddle>", "[extra words]", "<|fim_pad|>"),
)


@pytest.mark.parametrize("name", PADDING)
def test_more_entries_that_are_padding_are_no_difference(name):
    base, longer = word_tokenizer(["a", "b"]), word_tokenizer(["a", "b", name])
    check_same_tokenizer(base, longer)
    check_same_tokenizer(longer, base)


@pytest.mark.parametrize("name", WORDS)
def test_more_entries_that_are_words_are_a_difference(name):
    base, longer = word_tokenizer(["a", "b"]), word_tokenizer(["a", "b", name])
    with expect_user_error("different tokenizers: id 2 is None to the target"):
        check_same_tokenizer(base, longer)
    with expect_user_error("different tokenizers: id 2 is .* to the target and None to the draft"):
        check_same_tokenizer(longer, base)


@pytest.mark.parametrize(
    ("target", "draft", "message"),
    [
        ("abc", "axc", "id 1 is 'b' to the target and 'x' to the draft; use a draft trained for"),
        ("abcd", "abc", "id 3 is 'd' to the target and None to the draft"),
        ("ab", "abc", "id 2 is None to the target and 'c' to the draft"),
    ],
)
def test_different_tokenizers_show_the_first_difference(target, draft, message):
    with expect_user_error(message):
        check_same_tokenizer(word_tokenizer(target), word_tokenizer(draft))


def test_a_renamed_reserved_token_is_a_notice():
    reserved, renamed = "<|reserved_special_token_4|>", "<|finetune_right_pad_id|>"
    target = word_tokenizer(["a", reserved, "b"], (reserved,))
    draft = word_tokenizer(["a", renamed, "b"], (renamed,))
    for pair in ((target, draft), (draft, target)):
        (line,) = check_same_tokenizer(*pair)
        assert "id 1" in line
        assert reserved in line
        assert renamed in line


@pytest.mark.parametrize("special", [(), ("<|x|>",), ("<|reserved_special_token_4|>",)])
def test_a_renamed_token_that_texts_may_hold_is_a_difference(special):
    """One of the two is an ordinary word, or neither name is that of a reserved token."""
    target = word_tokenizer(["a", "<|x|>", "b"], special)
    other = "<|y|>" if special == ("<|x|>",) else "<|reserved_special_token_4|>"
    draft = word_tokenizer(["a", other, "b"], (other,) if special else ())
    with expect_user_error("id 1 is '<|x|>' to the target"):
        check_same_tokenizer(target, draft)


def digits(backend):
    split = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, backend.pre_tokenizer])


def composed(backend):
    backend.normalizer = normalizers.NFC()


def lower(backend):
    backend.normalizer = normalizers.Lowercase()


def prefixed(backend):
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


@pytest.mark.parametrize("change", [digits, composed, lower, prefixed])
def test_equal_entries_and_another_pipeline_are_a_difference(change):
    texts = ("123 12 1 2 3", "cafe café 'll x\n\n\ny   z", "Hello hello HELLO  \n \n x;\n\n  y")
    base = tiny_tokenizer(360, texts=texts * 3)
    other = changed(base, change)
    assert base.vocabulary() == other.vocabulary()
    assert behaviour_hash(base) != behaviour_hash(other)
    for pair in ((base, other), (other, base)):
        with expect_user_error(
            r"different tokenizers: '.*' is \[.*\] to the target and \[.*earlier"
        ):
            check_same_tokenizer(*pair)
    again = changed(base, lambda backend: None)
    assert behaviour_hash(again) == behaviour_hash(base)
    assert check_same_tokenizer(base, again) == []


def test_an_added_token_that_takes_the_space_before_it_is_a_difference():
    base = tiny_tokenizer(300)

    def greedy(backend):
        described = json.loads(backend.to_str())
        described["added_tokens"][1]["lstrip"] = True
        return tokenizers.Tokenizer.from_str(json.dumps(described))

    backend = greedy(base._fast.backend_tokenizer)
    other = Tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=backend))
    assert behaviour_hash(base) == behaviour_hash(other)
    with expect_user_error(r"'a <\|im_start\|> b' is"):
        check_same_tokenizer(base, other)
