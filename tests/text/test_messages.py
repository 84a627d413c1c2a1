"""Rows of public chat files: what each form reads as, what is left out and why, and the files that hold them."""

from __future__ import annotations

import collections
import gzip
import json

import datasets
import pytest

from s2d_jax.errors import UserError
from s2d_jax.files import json_rows
from s2d_jax.text.conversations import read_conversations, read_rows
from s2d_jax.text.messages import UnusableRow, parse_messages, text_of

TALK = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
SHAREGPT = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
PARTS = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK},
        {"conversations": SHAREGPT},
        {"conversations": TALK},
        {"messages": SHAREGPT},
        {"conversation": TALK},
        {"messages": [], "conversations": SHAREGPT},
        {"messages": None, "conversation": TALK},
        {"messages": json.dumps(TALK)},
        {"conversations": json.dumps(SHAREGPT), "id": "x"},
        json.dumps({"messages": TALK}),
        TALK,
        {
            "messages": [
                {"role": "User", "content": "Why?"},
                {"role": " ASSISTANT", "content": "So."},
            ]
        },
        {"messages": [{"role": "user", "content": PARTS, "name": None}, TALK[1]]},
        {"messages": [{"from": None, "value": None, **turn} for turn in TALK]},
        {"messages": {"role": ["user", "assistant"], "content": ["Why?", "So."]}},
        {"prompt": "Why?", "completion": "So."},
        {"prompt": TALK[:1], "completion": TALK[1:]},
        {"prompt": "Why?", "completion": TALK[1:], "messages": None},
    ],
)
def test_rows_that_can_be_read_in_one_way_are_read(row):
    assert parse_messages(row, "here") == TALK


def test_what_a_developer_says_is_the_system_message():
    row = {"messages": [{"role": "developer", "content": "Be brief."}, *TALK]}
    assert parse_messages(row, "here")[0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "Why?"}, "no_conversation"),
        ({"messages": "[not JSON"}, "no_conversation"),
        ({"prompt": "Why?"}, "no_conversation"),
        ({"prompt": "Why?", "completion": None}, "no_conversation"),
        (None, "no_conversation"),
        (3, "no_conversation"),
        ([], "no_conversation"),
        ({}, "no_conversation"),
        ({"messages": [{"role": "user", "content": None}]}, "not_text"),
        ({"messages": [{"role": "user", "content": 5}]}, "not_text"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "not_text"),
        ({"messages": [{"role": "user", "content": [*PARTS, {"type": "image"}]}]}, "not_text"),
        ({"messages": [{"role": "user"}]}, "not_text"),
        ({"messages": [None]}, "not_text"),
        ({"prompt": 3, "completion": "So."}, "not_text"),
        ({"messages": [*TALK, {"role": "tool", "content": "7"}]}, "other_roles"),
        ({"messages": [*TALK, {"role": "function", "content": "7"}]}, "other_roles"),
        ({"messages": [{"role": None, "content": "7"}]}, "other_roles"),
        ({"messages": [{"role": ["user"], "content": "7"}]}, "other_roles"),
        ({"messages": TALK, "finished": "yes"}, "unclear_finished"),
    ],
)
def test_other_rows_are_left_out_by_reason(row, reason):
    with pytest.raises(UnusableRow, match=r"^here: ") as caught:
        parse_messages(row, "here")
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)


def test_a_file_of_mixed_rows_gives_those_that_can_be_used(tmp_path):
    rows = [{"messages": TALK}, {"text": "x"}, {"conversations": SHAREGPT}, {"messages": [None]}]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    left_out: collections.Counter[str] = collections.Counter()
    assert read_conversations(path, left_out) == [TALK, TALK]
    assert left_out == {"no_conversation": 1, "not_text": 1}
    path.write_text('{"text": "x"}\n3\n')
    with pytest.raises(UserError, match=r"holds no conversation \(.*line 1: expected a list"):
        read_conversations(path, left_out)


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"messages": TALK}, indent=2),
        json.dumps([{"messages": TALK}], indent=2),
        json.dumps([{"messages": TALK}]),
        json.dumps({"messages": TALK}) + "\r\n\r\n",
        "\ufeff" + json.dumps({"messages": TALK}),
        "\n  " + json.dumps({"messages": TALK}, indent=1) + "\n\n",
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_json_is_read_however_it_is_laid_out(tmp_path, text, packed):
    data = text.encode()
    (tmp_path / "chat").write_bytes(gzip.compress(data) if packed else data)
    assert read_conversations(tmp_path / "chat") == [TALK]


def test_several_values_over_several_lines_are_told_by_their_first_line(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('{\n"a": 1\n}\n{"a":\n2}\n')
    assert list(json_rows(path)) == [(f"{path}: line 1", {"a": 1}), (f"{path}: line 4", {"a": 2})]
    path.write_text('{\n"a": 1\n}\n{"a":\n}\n')
    with pytest.raises(UserError, match=r"rows.json is not valid JSON .*: line 5 column 1"):
        list(json_rows(path))


def test_only_a_line_feed_ends_a_row(tmp_path):
    """JSON may hold the other characters that end lines elsewhere, and `infer.generate --out` writes them."""
    texts = ["plain", "a\u2028b\u2029c\x85d"]
    rows = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{row}\r\n" for row in rows), encoding="utf-8", newline="")
    assert [row["text"] for _, row in json_rows(path)] == texts


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ("{}".encode("utf-16"), "UTF-16; convert it"),
        (b'{"messages": "\xff"}', "line 1: not UTF-8"),
        (b"\x1f\x8bnonsense", "damaged gzip"),
        (b"PAR1 and no more", "not readable as a dataset"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"messages": ' + b"9" * 5000 + b"}", "thousands of digits"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, data, told):
    (tmp_path / "chat").write_bytes(data)
    with pytest.raises(UserError, match=told) as caught:
        read_conversations(tmp_path / "chat", collections.Counter())
    assert "\n" not in str(caught.value)


def test_half_surrogate_pairs_are_replaced(tmp_path):
    (tmp_path / "chat").write_text('{"prompt": "a\\ud800", "completion": "b"}')
    assert read_conversations(tmp_path / "chat")[0][0]["content"] == "a\ufffd"


def test_text_parts_are_joined_and_nothing_else_is_text():
    assert text_of(PARTS) == text_of(tuple(PARTS)) == "Why?"
    for content in (None, 3, True, [], ["a"], [{"type": "text"}], [{"text": "a"}], {"text": "a"}):
        assert text_of(content) is None


def parquet(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(list(rows)).to_parquet(str(path))


def test_a_folder_of_a_dataset_repository_gives_its_training_split(tmp_path):
    one, two = {"messages": TALK}, {"messages": TALK * 2}
    (tmp_path / ".git").mkdir()
    (tmp_path / "README.md").write_text("A data set.")
    with pytest.raises(UserError, match="without a saved dataset or parquet files"):
        read_conversations(tmp_path)
    for number, row in enumerate((one, two)):
        parquet(tmp_path / "data" / f"train-0000{number}-of-00002.parquet", row)
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", one)
    parquet(tmp_path / ".cache" / "train-00000-of-00001.parquet", one)
    assert read_conversations(tmp_path) == [TALK, TALK * 2]
    assert [where.split("data/")[1] for where, _ in read_rows(tmp_path)] == [
        "train-00000-of-00002.parquet: row 1",
        "train-00001-of-00002.parquet: row 1",
    ]
    parquet(tmp_path / "other" / "train" / "0000.parquet", one)
    with pytest.raises(UserError, match="several data sets, in data, other/train; give one"):
        read_conversations(tmp_path)


def test_folders_without_splits_or_with_several_to_train_on(tmp_path):
    parquet(tmp_path / "plain" / "part-0.parquet", {"messages": TALK})
    parquet(tmp_path / "plain" / "part-1.parquet", {"messages": TALK})
    assert read_conversations(tmp_path / "plain") == [TALK, TALK]
    for name in ("train_sft-0.parquet", "train_gen-0.parquet"):
        parquet(tmp_path / "two" / name, {"messages": TALK})
    with pytest.raises(UserError, match="has the splits train_gen, train_sft; give the files"):
        read_conversations(tmp_path / "two")
    (tmp_path / "plain" / "part-1.parquet").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match=r"part-1.parquet: is no parquet file in spite of its name"):
        read_conversations(tmp_path / "plain")
