"""Text in portions: whole characters, the same text in the end, and nothing behind a stop string."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from tiny import tiny_tokenizer

from s2d_jax.text.detokenizer import RowText
from s2d_jax.text.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
TEXT = "the naïve café, 漢字 and 🙂🙃 jumps over the lazy dog"


@functools.cache
def byte_level() -> Tokenizer:
    return tiny_tokenizer(300)


@functools.cache
def byte_fallback() -> Tokenizer:
    """Like Llama-2's: characters that the vocabulary lacks are bytes, and a leading space is dropped when decoding."""
    from tokenizers import Tokenizer as RustTokenizer
    from tokenizers import decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\N{LOWER ONE EIGHTH BLOCK}", *"abcdefghijklmnopqrstuvwxyz,"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    rust = RustTokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    space = "\N{LOWER ONE EIGHTH BLOCK}"
    rust.normalizer = normalizers.Sequence(
        [normalizers.Prepend(space), normalizers.Replace(" ", space)]
    )
    rust.decoder = decoders.Sequence(
        [
            *(decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()),
            decoders.Strip(" ", 1, 0),
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=rust, eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )
    return Tokenizer(fast)


def portions(rng, ids):
    """`ids` cut at random places."""
    cuts = np.sort(rng.integers(0, len(ids) + 1, size=rng.integers(0, len(ids) + 1)))
    return [part.tolist() for part in np.split(np.asarray(ids, int), cuts)]


def given_out(row: RowText, parts) -> tuple[list[str], list[int]]:
    texts, token_ids = [], []
    for number, part in enumerate(parts):
        text, kept = row.feed(part, ended=number == len(parts) - 1)
        texts.append(text)
        token_ids += kept
    return texts, token_ids


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_characters_of_several_tokens_come_whole(make):
    tokenizer = make()
    ids = tokenizer.encode(TEXT)
    broken = [REPLACEMENT in tokenizer.decode(ids[: n + 1]) for n in range(len(ids))]
    assert sum(broken) > 5  # or no character would be split
    texts, token_ids = given_out(RowText(tokenizer), [[i] for i in ids])
    assert "".join(texts) == tokenizer.decode(ids) == TEXT
    assert token_ids == ids
    assert not any(REPLACEMENT in text for text in texts)
    assert sum(bool(text) for text in texts) > 10


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_portions_of_random_tokens_add_up_to_the_whole_text(make):
    """Random tokens are mostly broken characters, special tokens among them."""
    tokenizer, rng = make(), np.random.default_rng(0)
    size = max(tokenizer.vocabulary().values()) + 1
    for _ in range(300):
        ids = rng.integers(size, size=rng.integers(1, 25)).tolist()
        texts, token_ids = given_out(RowText(tokenizer), portions(rng, ids))
        assert "".join(texts) == tokenizer.decode(ids)
        assert token_ids == ids


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_the_cut_at_a_stop_string_does_not_depend_on_the_portions(make):
    tokenizer, rng = make(), np.random.default_rng(1)
    size = max(tokenizer.vocabulary().values()) + 1
    found = 0
    for _ in range(200):
        ids = rng.integers(size, size=20).tolist()
        stop = tuple({tokenizer.decode(ids[i : i + 2]) for i in (6, 11)} - {""})
        single = RowText(tokenizer, stop)
        given_out(single, [[i] for i in ids])
        row = RowText(tokenizer, stop)
        texts, _ = given_out(row, portions(rng, ids))
        assert (row.text, row.token_ids, row.stopped) == (
            *(single.text, single.token_ids, single.stopped),
        )
        assert "".join(texts) == row.text
        assert not any(s in row.text for s in stop)
        assert len(row.token_ids) + row.overshoot == len(ids)
        found += row.stopped
    assert found > 100


def test_what_may_begin_a_stop_string_is_held_back():
    tokenizer = byte_level()
    row = RowText(tokenizer, ("lazy cat", "zzz"))
    ids = tokenizer.encode("over the lazy")
    assert row.feed(ids, ended=False)[0] == "over the "
    rest = tokenizer.encode(" dog")
    assert row.feed(rest, ended=True)[0] == "lazy dog"
    row = RowText(tokenizer, ("lazy cat",))
    row.feed(ids, ended=False)
    tail = [*tokenizer.encode(" cat"), *rest]
    text, kept = row.feed(tail, ended=False)
    assert (text, row.text, row.stopped) == ("", "over the ", True)
    assert [*ids, *kept] == row.token_ids == [*ids, *tail[: len(tail) - len(rest)]]
    assert row.overshoot == len(rest)
    assert row.feed([5, 6], ended=True) == ("", [])


def test_without_a_tokenizer_there_are_only_tokens():
    row = RowText(None)
    assert row.feed([4, 5], ended=False) == ("", [4, 5])
    assert row.token_ids == [4, 5]
