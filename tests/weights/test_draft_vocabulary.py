"""Lists of tokens for a draft's head: what they hold, how they are written, how they are chosen and judged."""

from __future__ import annotations

import collections
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from infer.trim.choose import choose_tokens, coverage
from s2d_jax.errors import UserError
from s2d_jax.weights.vocabulary import DraftVocabulary, read_vocabulary


def _error(match):
    return pytest.raises(UserError, match=match)


@settings(max_examples=100, deadline=None)
@given(st.sets(st.integers(0, 400), min_size=1))
def test_what_is_written_is_read(ids):
    vocabulary = DraftVocabulary(np.array(sorted(ids)), "abc", {"answers": ["a.jsonl"]})
    raw = json.loads(json.dumps(vocabulary.to_json()))
    again = DraftVocabulary.from_json(raw, "file")
    np.testing.assert_array_equal(again.ids_U, vocabulary.ids_U)
    assert again.ids_U.dtype == np.int32
    assert (again.tokens_sha256, again.provenance) == ("abc", {"answers": ["a.jsonl"]})


def test_a_list_without_any_run_is_still_small():
    """32,000 ids of six digits, no two in a row: the worst case."""
    text = json.dumps(DraftVocabulary(np.arange(100_000, 164_000, 2)).to_json(), indent=2)
    assert len(text) < 250_000


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_choice_equals_its_definition(data):
    counts = data.draw(st.lists(st.integers(0, 4), min_size=3, max_size=20))
    V = len(counts)
    text = data.draw(st.lists(st.integers(0, 2), min_size=V, max_size=V))
    keep = data.draw(st.sets(st.integers(0, V - 1), max_size=V - 1))
    size = data.draw(st.integers(len(keep) + 1, V))
    expected = set(keep)
    for token in sorted(range(V), key=lambda i: (-counts[i], -text[i], i)):
        if len(expected) < size:
            expected.add(token)
    chosen = choose_tokens(np.array(counts), np.array(text), sorted(keep), size)
    assert chosen.tolist() == sorted(expected)


def test_coverage_is_judged_on_answers_that_made_no_part_of_the_list():
    counts_FV = np.array([[0, 0, 9, 1, 0, 0], [0, 0, 5, 0, 0, 5], [0, 0, 0, 0, 10, 0]])
    keep, text_V = [0], np.array([0, 1, 0, 0, 0, 0])
    covered = coverage(counts_FV, text_V, keep, [2, 3, 6])
    for size, share in covered.items():
        hits = 0
        for fold_V in counts_FV:
            listed = choose_tokens(counts_FV.sum(axis=0) - fold_V, text_V, keep, size)
            written = collections.Counter({i: int(n) for i, n in enumerate(fold_V)})
            hits += sum(written[int(i)] for i in listed)
        assert share == pytest.approx(hits / counts_FV.sum())
    # Token 4 is written in one fold only, so no list of two or three that is judged on it can hold it.
    assert covered[3] < 2 / 3
    assert covered[6] == 1


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "the draft vocabulary is empty"),
        ([3, 3, 5], "lists id 3 after 3; list every id once"),
        ([3, 5, 4], "lists id 4 after 5; list every id once"),
        ([-1, 5], "lists id -1; ids are 0 to"),
        ([5, 2**31], f"lists id {2**31}; ids are 0 to"),
    ],
)
def test_bad_ids(ids, message):
    with _error(message):
        DraftVocabulary(np.array(ids))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([1, 2], "x.json holds a JSON list, an object is expected"),
        ({"ids": "0-3"}, "x.json: the draft vocabulary lacks size; make it with"),
        ({"size": 5, "ids": "0-3"}, "lists 4 ids, size=5 is expected"),
        ({"size": 5, "ids": "0-3000000000"}, "lists 3000000001 ids, size=5 is expected"),
        ({"size": 2 * 10**9, "ids": "0-1999999999"}, "size=2000000000 must be a whole number from"),
        ({"size": 2, "ids": "0-99999999999999"}, "ids='0-99999999999999' must look like 0-99"),
        ({"size": 2, "ids": [0, 1]}, r"ids=\[0, 1\] must be a text"),
        ({"size": "2", "ids": "0,1"}, "size='2' must be a whole number"),
        ({"size": 2, "ids": "0,x"}, "ids='0,x' must look like 0-99,120"),
        ({"size": 2, "ids": "0,1", "provenance": 5}, "provenance: 5 must be an object"),
        ({"size": 3, "ids": "4,0-1"}, "x.json: the draft vocabulary lists id 0 after 4"),
        ({"size": 0, "ids": "3-2"}, "x.json"),
        (3, "holds a JSON int, an object is expected"),
    ],
)
def test_bad_files(raw, message, tmp_path):
    file = tmp_path / "x.json"
    file.write_text(json.dumps(raw))
    with _error(message):
        read_vocabulary(file)


def test_no_file(tmp_path):
    with _error("nothing.json does not exist; give a file that python -m infer.trim"):
        read_vocabulary(tmp_path / "nothing.json")


def test_a_list_knows_its_tokenizer():
    """By the listed tokens alone: padding behind them may have any name."""
    tokenizer = tiny_tokenizer(300)
    listed = DraftVocabulary.of_tokenizer([270, 0, 262], tokenizer, {})
    assert listed.ids_U.tolist() == [0, 262, 270]
    listed.check(300, tokenizer)
    listed.check(300, None)
    with _error("was made for another tokenizer; make the list with this draft"):
        listed.check(300, tiny_tokenizer(300, texts=("quite other words",) * 3))
    with _error("lists id 270, the draft has 270 tokens"):
        listed.check(270, tokenizer)


def test_impossible_sizes():
    nothing = np.zeros(6, int)
    with _error("size 7 exceeds the vocabulary of 6 tokens"):
        choose_tokens(nothing, nothing, [0], 7)
    with _error("size 2 does not exceed the 2 special tokens that are always kept"):
        choose_tokens(nothing, nothing, [0, 1], 2)
