"""Files of prompts, conversations and answers made at random: they are read, or refused in one line."""

from __future__ import annotations

import collections
import gzip
import json
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from infer.generate.talks import read_talks
from infer.trim.listing import Written, read_answers
from s2d_jax.cli.prompts import Question, read_questions
from s2d_jax.errors import UserError
from s2d_jax.text.conversations import read_conversations
from s2d_jax.text.prompts import OnePrompt, is_ids, split_prompts
from train.data.documents import training_turns

# Texts of any code points, halves of surrogate pairs and line ends of Unicode included.
_TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["", " ", "\ud800", "\u2028", "\x85", "\x00", "\x1b[2J", "[/INST]", "[", "{"]),
)
_SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), _TEXTS)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXTS, inner, max_size=3),
    max_leaves=6,
)
_PARTS = st.lists(
    st.fixed_dictionaries({"type": st.sampled_from(["text", "image"]), "text": _TEXTS | _VALUES}),
    max_size=2,
)
_ROLES = st.sampled_from(
    ["user", "User", "human", "assistant", "gpt", "system", "tool", "", None, 5]
)
_TURNS = st.lists(
    st.one_of(
        st.fixed_dictionaries({"role": _ROLES, "content": _TEXTS | _PARTS | _VALUES}),
        st.fixed_dictionaries({"from": _ROLES, "value": _TEXTS | _VALUES}),
        _VALUES,
    ),
    max_size=4,
)
_ROWS = st.one_of(
    st.dictionaries(
        st.sampled_from(
            (
                *("messages", "conversations", "conversation", "prompt", "completion", "turns"),
                *("response", "responses", "question_id", "id", "category", "finished", "text"),
            )
        ),
        _TURNS | _VALUES | _TURNS.map(json.dumps) | st.lists(_TEXTS, max_size=2),
        max_size=4,
    ),
    _VALUES,
)


def _lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


_FILES = st.one_of(
    st.lists(_ROWS, max_size=4).flatmap(
        lambda rows: st.sampled_from(
            [_lines(rows), json.dumps(rows), json.dumps(rows, indent=1), _lines(rows)[:-7],
             "".join(json.dumps(row, indent=1) for row in rows), _lines(rows).replace("\n", "\r\n")]
        )
    ).map(lambda text: text.encode()),
    st.binary(max_size=64),
    st.binary(max_size=16).map(lambda tail: b"\x1f\x8b" + tail),
    st.binary(max_size=16).map(lambda tail: b"PAR1" + tail),
    st.lists(_ROWS, max_size=3).map(lambda rows: gzip.compress(_lines(rows).encode())),
    st.lists(_ROWS, max_size=3).map(lambda rows: _lines(rows).encode("utf-16")),
    st.sampled_from([b"[" * 5000, b'{"a":' * 5000, b'{"prompt": ' + b"9" * 5000 + b"}"]),
)  # fmt: skip


def _is_text(value: Any) -> bool:
    """Whether it can be written to a file, and given to a tokenizer."""
    return isinstance(value, str) and value == value.encode().decode()


def _prompts(path: Path) -> None:
    for question in read_questions(path):
        _check_question(question)


def _check_question(question: Question) -> None:
    assert question.turns
    assert all(map(_is_text, question.turns))
    assert isinstance(question.question_id, int) or _is_text(question.question_id)
    assert _is_text(question.category)
    assert all(map(_is_text, (m["content"] for m in question.messages([]))))


def _conversations(path: Path) -> None:
    left_out: collections.Counter[str] = collections.Counter()
    for messages in read_conversations(path, left_out):
        assert {message["role"] for message in messages} <= {"system", "user", "assistant"}
        assert all(_is_text(message["content"]) for message in messages)
        turns, reason = training_turns(messages)
        assert bool(turns) != bool(reason)


def _talks(path: Path) -> None:
    for talk in read_talks(path)[0]:
        _check_question(talk.question)


def _answers(path: Path) -> None:
    for written in read_answers(path):
        assert isinstance(written, Written)
        assert _is_text(written.text)
        assert _is_text(written.prompt)


_READERS = (_prompts, _conversations, _talks, _answers)


def refusal(work: Callable[[], object]) -> str:
    """The one line of what refuses the work; "" if nothing does. No other exception may come."""
    try:
        work()
    except UserError as error:
        return str(error)
    return ""


def read_or_refused(read: Callable[[Path], None], data: bytes, name: str) -> None:
    """Reads a file of these bytes; it may be refused in a line of moderate length."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / name
        path.write_bytes(data)
        told = refusal(lambda: read(path))
    assert told.isprintable(), told
    assert len(told) < 1000


@pytest.mark.parametrize("read", _READERS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(data=_FILES, name=st.sampled_from(["a.jsonl", "a.txt"]))
@example(data=b'{"messages": [{"role": "user", "content": null}]}\n', name="a.jsonl")
@example(data=b'{"prompt": "\\ud800", "question_id": "\\udc00"}\n', name="a.jsonl")
@example(data=b'{"turns": [], "messages": {"role": [], "content": []}}\n', name="a.jsonl")
def test_files_are_read_or_refused_in_one_line(read, data, name):
    read_or_refused(read, data, name)


@pytest.mark.exhaustive("thousands of random files for each reader, where the others are dozens")
@pytest.mark.parametrize("read", _READERS)
@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(data=_FILES, name=st.sampled_from(["a.jsonl", "a.txt"]))
def test_many_files_are_read_or_refused_in_bounded_memory(read, data, name):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read_or_refused(read, data, name)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 << 10  # kB


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(value=_TURNS | _VALUES | st.lists(_TEXTS, max_size=3))
def test_prompts_from_python_are_taken_or_refused_in_one_line(value):
    found: list[OnePrompt] = []
    assert refusal(lambda: found.extend(split_prompts(value))).isprintable()
    for prompt in found:
        if isinstance(prompt, str):
            assert _is_text(prompt)
        elif not is_ids(prompt):
            assert all(_is_text(message["content"]) for message in prompt)
