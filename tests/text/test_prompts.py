"""What is one prompt, what is several, and what is none."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from s2d_jax.errors import UserError
from s2d_jax.text.prompts import check_ids, is_ids, names_of_prompts, split_prompts

TALK = [{"role": "user", "content": "Why?"}]
IDS = [5, 9, 2]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("def fib(n):", ["def fib(n):"]),
        (["def fib(n):"], ["def fib(n):"]),
        (("one", "two"), ["one", "two"]),
        ("", [""]),
        (TALK, [TALK]),
        ([TALK, TALK], [TALK, TALK]),
        (IDS, [IDS]),
        (tuple(IDS), [IDS]),
        (range(3), [[0, 1, 2]]),
        (np.array(IDS), [IDS]),
        (np.array(IDS, np.uint16), [IDS]),
        (jnp.array(IDS), [IDS]),
        (list(np.array(IDS)), [IDS]),
        (list(jnp.array(IDS)), [IDS]),
        ([IDS, [7]], [IDS, [7]]),
        ([np.array(IDS), jnp.array([7]), (1,)], [IDS, [7], [1]]),
        (np.array([IDS, IDS]), [IDS, IDS]),
        (jnp.array([IDS, IDS]), [IDS, IDS]),
        (["one", TALK, IDS], ["one", TALK, IDS]),
        ([[]], [[]]),  # an empty prompt is refused by who asks for its tokens
    ],
)
def test_one_prompt_or_several(given, expected):
    found = split_prompts(given)
    assert found == expected
    for prompt in found:
        if is_ids(prompt):
            assert all(type(token) is int for token in prompt)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, r"None \(NoneType\) is no prompt; give a text, a list of messages"),
        (3.5, r"3.5 \(float\) is no prompt"),
        (7, r"7 \(int\) is no prompt"),
        (True, r"True \(bool\) is no prompt"),
        (TALK[0], r"\(dict\) is no prompt; a conversation is a list of messages: \[\{'role'"),
        ([{"role": "user"}], r"\{'role': 'user'\} \(dict\) is no prompt; a conversation is"),
        ([{"role": "user", "content": None}], "is no prompt; a conversation is"),
        (b"text", r"b'text' \(bytes\) is no prompt; decode it to a text first"),
        ([b"text"], "decode it to a text first"),
        ([True, False], r"True \(bool\) is no prompt"),
        ([1, "a"], r"\[1, 'a'\] \(list\) is no prompt"),
        ([1, None], r"\[1, None\] \(list\) is no prompt"),
        (["one", None], r"None \(NoneType\) is no prompt"),
        ([1.5, 2.0], r"1.5 \(float\) is no prompt"),
        ([[1, 2.5]], r"\[\[1, 2.5\]\] \(list\) is no prompt"),
        ([["one"]], r"\[\['one'\]\] \(list\) is no prompt"),
        (np.zeros(3), r"array\(\[0., 0., 0.\]\) \(ndarray\) is no prompt"),
        (np.zeros((1, 1, 1), int), "is no prompt"),
        (np.array(3), "is no prompt"),
        (np.array([True]), "is no prompt"),
        ({"one", "two"}, r"\(set\) is no prompt"),
        ([], "there are no prompts; give at least one: a text"),
        ((), "there are no prompts"),
        (np.zeros(0, int), "there are no prompts"),
    ],
)
def test_anything_else_is_refused_in_one_line(given, message):
    with pytest.raises(UserError, match=message) as caught:
        split_prompts(given)
    assert "\n" not in str(caught.value)


def test_long_values_are_shortened():
    with pytest.raises(UserError) as caught:
        split_prompts([list(range(1000)), [1.5] * 1000])
    assert len(str(caught.value)) < 200


def test_contents_of_text_parts_are_joined_and_half_surrogate_pairs_replaced():
    parts = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?\ud800"}]
    assert split_prompts([{"role": "user", "content": parts}]) == [
        [{"role": "user", "content": "Why?\ufffd"}]
    ]
    assert split_prompts(["a\udcff", "\U0001f600"]) == ["a\ufffd", "\U0001f600"]
    for content in (7, [], [*parts, {"type": "image_url", "image_url": "x"}]):
        with pytest.raises(UserError, match="is no prompt; a conversation is"):
            split_prompts([{"role": "user", "content": content}])


def test_an_empty_prompt_is_told_by_its_place():
    assert names_of_prompts(1) == ["the prompt"]
    with pytest.raises(
        UserError, match="prompt 2 of 2 is empty: it gives no token; give at least one"
    ):
        check_ids([], 10, names_of_prompts(2)[1])
