"""Reading prompts, and grouping them into batches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infer.generate.batching import plan_batches
from s2d_jax.cli.prompts import Question, read_questions
from s2d_jax.errors import UserError


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_three_kinds_of_rows_and_text_lines(tmp_path):
    history = {"role": "system", "content": "be brief"}
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "hi", "category": "greeting"},
        {"question_id": 81, "category": "writing", "turns": ["first", "second"], "reference": []},
        {
            "messages": [
                history,
                {"role": "user", "content": "hello"},
                {"role": "assistant", "content": "dropped"},
            ]
        },
    )
    assert read_questions(path) == [
        Question(1, "greeting", ("hi",)),
        Question(81, "writing", ("first", "second")),
        Question(3, "", ("hello",), (history,)),
    ]
    text = tmp_path / "a.txt"
    text.write_text("one\n\ntwo\n")
    assert [question.turns for question in read_questions(text)] == [("one",), ("two",)]


def test_later_turns_follow_the_answers():
    question = Question(1, "", ("first", "second"), ({"role": "system", "content": "s"},))
    roles = [message["role"] for message in question.messages(["answer"])]
    assert roles == ["system", "user", "assistant", "user"]
    assert question.messages(["answer"])[-1]["content"] == "second"
    assert question.messages(["a", "b"])[-1] == {"role": "assistant", "content": "b"}


def test_categories_and_the_maximum(tmp_path):
    rows = [{"prompt": str(i), "category": "even" if i % 2 == 0 else "odd"} for i in range(6)]
    path = write(tmp_path / "a.jsonl", *rows)
    found = read_questions(path, categories=("even",), max_questions=2)
    assert [question.turns[0] for question in found] == ["0", "2"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not valid JSON"),
        ("[1]", r"line 2: is \[1\]; expected prompt"),
        ('{"question": "?"}', r"line 2: is an object of \['question'\]; expected prompt"),
        ('{"prompt": null}', "line 2: is an object of .*; expected prompt"),
        ('{"prompt": 7}', "expected prompt"),
        ('{"turns": ["a", null]}', "expected prompt"),
        ('{"messages": [{"role": "user", "content": null}]}', "line 2: message 1 lacks"),
        ('{"messages": [{"role": 5, "content": "a"}]}', "message 1 lacks role"),
        ('{"messages": [3]}', "message 1 lacks role or content as text, it is 3"),
        ('{"turns": []}', "expected prompt"),
        ('{"messages": [{"role": "user"}]}', "message 1 lacks role or content"),
        ('{"messages": [{"role": "system", "content": "s"}]}', "no user message at the end"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        read_questions(path)


def test_files_without_prompts_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_questions(tmp_path / "missing.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no prompts"):
        read_questions(tmp_path / "empty.jsonl")
    path = write(tmp_path / "a.jsonl", {"prompt": "x", "category": "maths"})
    with pytest.raises(UserError, match=r"category 'poems' is not in .* it has maths"):
        read_questions(path, categories=("poems",))
    with pytest.raises(UserError, match="max-questions 0"):
        read_questions(path, max_questions=0)


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40), size=st.integers(1, 9))
def test_batches_hold_every_prompt_once_in_order_of_length(lengths, size):
    batches = plan_batches(lengths, size)
    order = [i for batch in batches for i in batch.indices]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[i] for i in order] == sorted(lengths)
    assert len({len(batch.indices) + batch.padding for batch in batches}) == 1
    assert all(batch.padding == 0 for batch in batches[:-1])


def test_demo_prompts_are_many_and_separate():
    configs = Path(__file__).parents[2] / "configs"
    train, held_out = (
        read_questions(configs / f"demo_prompts_{part}.jsonl") for part in ("train", "eval")
    )
    assert len(train) >= 300
    assert len(held_out) >= 40
    assert not {q.turns for q in train} & {q.turns for q in held_out}
    assert {q.category for q in held_out} <= {q.category for q in train}
