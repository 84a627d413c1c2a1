"""Conversations in, packed rows and batches out."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny import tiny_tokenizer

from s2d_jax.errors import UserError
from s2d_jax.sharding import MeshConfig, make_mesh
from s2d_jax.text.conversations import read_conversations
from train.config.sections import DataSection
from train.data.batches import make_batch, rows_of_step, split_rows
from train.data.documents import documents_of
from train.data.packing import pack
from train.data.rows import build_rows, load_rows, save_rows

VOCAB = 300
SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "one two"},
        {"from": "gpt", "value": "three four"},
        {"from": "human", "value": "five"},
        {"from": "gpt", "value": "six seven eight"},
    ]
}
MESSAGES = [
    {"role": "user", "content": "one two"},
    {"role": "assistant", "content": "three four"},
    {"role": "user", "content": "five"},
    {"role": "assistant", "content": "six seven eight"},
]


def tokenize(messages, tokenizer):
    """The one sequence that a conversation becomes under a template that only appends."""
    (document,) = documents_of(messages, tokenizer)
    return document


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(VOCAB)


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "chat.json") -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def test_both_formats_are_told_apart_by_content(write):
    lines = json.dumps({"messages": MESSAGES})
    assert read_conversations(write(json.dumps([SHAREGPT, SHAREGPT]))) == [MESSAGES, MESSAGES]
    assert read_conversations(write(f"{lines}\n\n{lines}\n", "chat.json")) == [MESSAGES, MESSAGES]
    assert read_conversations(write(json.dumps(SHAREGPT), "chat.txt")) == [MESSAGES]


GOOD = json.dumps({"messages": MESSAGES})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            f"{GOOD}\n{GOOD[:30]}\n",
            r"chat.json: line 2 is not valid JSON \(.*\); repair or remove it",
        ),
        (
            '[\n{"messages": []},\n{]',
            r"chat.json is not valid JSON \(.*: line 3 column 2\); repair or remove it",
        ),
        (f"{GOOD}\n3\n", r"line 2: expected a list `messages` or .*; it is 3"),
        ('{"text": "a"}', r"line 1: expected a list .*; it is an object of \['text'\]"),
        (f'[{GOOD}, {{"x": 1}}]', r"row 2: expected a list"),
        (
            '{"messages": [{"role": "user"}]}',
            r"line 1: turn 1 needs a role and text, it is {'role': 'user'}; repair or remove the row",
        ),
        (
            '{"conversations": [{"from": "x", "value": ""}]}',
            r"turn 1 has the role 'x'; use one of user",
        ),
        ("\n", r"chat.json: holds no conversation; give ShareGPT JSON or messages JSONL"),
    ],
)
def test_a_corrupt_row_is_named_by_file_and_line(write, text, message):
    with pytest.raises(UserError, match=message) as error:
        read_conversations(write(text))
    assert "\n" not in str(error.value)


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.json does not exist; give a conv"):
        read_conversations(tmp_path / "nowhere.json")
    (tmp_path / "bytes").write_bytes(b'{"messages": \xff}')
    with pytest.raises(UserError, match="line 1: not UTF-8 at byte 13; convert the file"):
        read_conversations(tmp_path / "bytes")


def rendered_answers(tokenizer, messages):
    """What the assistant writes, from the rendered text: each answer with its end-of-turn token."""
    pieces = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = tokenizer.render_chat(messages[:i], add_generation_prompt=True)
            whole = tokenizer.render_chat(messages[: i + 1], add_generation_prompt=False)
            pieces.append(whole[len(prompt) :].removesuffix("\n"))
    return pieces


@pytest.mark.parametrize("chat", [True, False], ids=["own template", "Vicuna template"])
def test_the_mask_covers_each_answer_and_its_end_of_turn_and_nothing_else(chat):
    tokenizer = tiny_tokenizer(VOCAB, chat=chat)
    ids, mask = tokenize(MESSAGES, tokenizer)
    assert ids == tokenizer.encode_chat(MESSAGES, add_generation_prompt=False)
    edges = np.flatnonzero(np.diff([0, *mask, 0]))
    spans = [
        tokenizer.decode(ids[start:stop], skip_special_tokens=False)
        for start, stop in edges.reshape(-1, 2)
    ]
    assert spans == rendered_answers(tokenizer, MESSAGES)
    assert all(span.endswith("<|im_end|>") for span in spans)
    for start, _ in edges.reshape(-1, 2):
        prompt = tokenizer.decode(ids[:start], skip_special_tokens=False)
        assert prompt.endswith("assistant\n" if chat else " ASSISTANT:")


@pytest.mark.parametrize("chat", [True, False], ids=["own template", "Vicuna template"])
def test_an_answer_that_was_cut_off_teaches_no_end_of_turn(chat, write):
    tokenizer = tiny_tokenizer(VOCAB, chat=chat)
    rows = [{"messages": MESSAGES, "finished": flags} for flags in ([False, True], [False], [True])]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    conversations = read_conversations(write(text, "cut.jsonl"))
    whole = ["three four<|im_end|>", "six seven eight<|im_end|>"]
    if not chat:
        whole = [f" {answer}" for answer in whole]
    cut = [answer.removesuffix("<|im_end|>") for answer in whole]
    expected = [[cut[0], whole[1]], [whole[0], cut[1]], whole]
    for messages, spans in zip(conversations, expected, strict=True):
        ids, mask = tokenize(messages, tokenizer)
        assert ids == tokenize(MESSAGES, tokenizer)[0]
        assert spans_of(ids, mask, tokenizer) == spans
    # Through the data set, whose rows share one set of keys.
    config = DataSection(paths=(write(text, "cut.jsonl"),), max_length=512)
    stops = set(tokenizer.stop_token_ids)
    counted = [
        token
        for row in build_rows(config, tokenizer, vocab_size=VOCAB)[0]
        for token, answer in zip(row["tokens"], row["answer"], strict=True)
        if answer
    ]
    assert sum(token in stops for token in counted) == 4


@pytest.mark.parametrize("finished", [[True, True, True], True, ["yes"], [None]])
def test_flags_that_fit_no_answer_are_refused(write, finished):
    row = json.dumps({"messages": MESSAGES, "finished": finished})
    with pytest.raises(UserError, match=r"line 1: finished=.* must be a list of true or false"):
        read_conversations(write(row))


def spans_of(ids, mask, tokenizer):
    """The texts that the mask covers."""
    edges = np.flatnonzero(np.diff([0, *mask, 0]))
    return [
        tokenizer.decode(ids[start:stop], skip_special_tokens=False)
        for start, stop in edges.reshape(-1, 2)
    ]


def test_the_masked_text_of_a_conversation_in_vicunas_words():
    """FastChat: the EOS right after an answer, the next user right after the EOS."""
    tokenizer = tiny_tokenizer(VOCAB, chat=False)
    ids, mask = tokenize(MESSAGES, tokenizer)
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert text.endswith(
        "user's questions. USER: one two ASSISTANT: three four<|im_end|>"
        "USER: five ASSISTANT: six seven eight<|im_end|>"
    )
    assert spans_of(ids, mask, tokenizer) == [
        " three four<|im_end|>",
        " six seven eight<|im_end|>",
    ]


def test_packing_keeps_every_document_whole_and_rows_full():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 33, 200).tolist()
    rows = pack(lengths, 32)
    assert sorted(index for row in rows for index in row) == list(range(200))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 32
    assert len(rows) <= 1.1 * np.ceil(sum(lengths) / 32)


def rows_of(tokenizer, write, count=6, max_length=64):
    text = "".join(
        json.dumps({"messages": MESSAGES[: 2 + 2 * (i % 2)]}) + "\n" for i in range(count)
    )
    config = DataSection(paths=(write(text),), max_length=max_length)
    return build_rows(config, tokenizer, vocab_size=VOCAB)


def test_rows_hold_documents_positions_and_targets(tokenizer, write):
    rows, report = rows_of(tokenizer, write)
    sharding = make_mesh(MeshConfig()).devices.item()
    batch = make_batch(rows, np.arange(len(rows)), _one(sharding))
    documents = [tokenize(MESSAGES[:2], tokenizer), tokenize(MESSAGES, tokenizer)]
    found = []
    for row in range(len(rows)):
        for segment in range(1, int(batch.segment_ids_BT[row].max()) + 1):
            where = np.flatnonzero(np.asarray(batch.segment_ids_BT[row] == segment))
            ids = np.asarray(batch.tokens_BT[row])[where].tolist()
            mask = next(mask for known, mask in documents if known == ids)
            found.append(ids)
            np.testing.assert_array_equal(batch.positions_BT[row][where], np.arange(len(ids)))
            np.testing.assert_array_equal(batch.targets_BT[row][where[:-1]], ids[1:])
            np.testing.assert_array_equal(batch.weights_BT[row][where], [*mask[1:], False])
    assert len(found) == 6
    padding = np.asarray(batch.segment_ids_BT) == 0
    assert not np.asarray(batch.weights_BT)[padding].any()
    assert (report.total["conversations"], report.total["truncated"]) == (6, 0)
    assert report.total["tokens"] == sum(map(len, found))
    assert report.total["answer_tokens"] == np.asarray(batch.weights_BT).sum()


def _one(device):
    from jax.sharding import SingleDeviceSharding

    return SingleDeviceSharding(device)


def test_truncation_is_counted_and_conversations_without_an_answer_left_are_dropped(
    tokenizer, write
):
    long = [MESSAGES[0], {"role": "assistant", "content": "ten " * 200}]
    lost = [{"role": "user", "content": "ten " * 200}, MESSAGES[1]]
    rows = "".join(json.dumps({"messages": m}) + "\n" for m in (MESSAGES, long, lost, MESSAGES[:1]))
    config = DataSection(paths=(write(rows),), max_length=128)
    packed, report = build_rows(config, tokenizer, vocab_size=VOCAB)
    counts = {name: count for name, count in report.total.items() if "token" not in name}
    assert {name: count for name, count in counts.items() if count} == {
        "conversations": 4,
        "no_answer": 1,
        "documents": 3,
        "truncated": 1,
        "truncated_before_any_answer": 1,
        "rows": 2,
    }
    assert {len(row["tokens"]) for row in packed} == {128}


@pytest.mark.parametrize(
    ("messages", "max_length", "vocab_size", "message"),
    [
        (MESSAGES, 4, VOCAB, "data.max_length=4 leaves no answer in any conversation; raise it"),
        (MESSAGES[:1], 64, VOCAB, "no conversation has a user turn and an answer"),
        (
            MESSAGES,
            64,
            50,
            r"the tokenizer wrote id \d+ \(.*\) in the rows, the model has 50 tokens",
        ),
    ],
)
def test_nothing_to_train_on(tokenizer, write, messages, max_length, vocab_size, message):
    config = DataSection(paths=(write(json.dumps({"messages": messages})),), max_length=max_length)
    with pytest.raises(UserError, match=message):
        build_rows(config, tokenizer, vocab_size=vocab_size)


def test_saved_rows_read_back_equal_and_a_failed_save_leaves_nothing(
    tokenizer, write, tmp_path, monkeypatch
):
    rows, _ = rows_of(tokenizer, write)
    save_rows(rows, tmp_path / "rows")
    assert load_rows(tmp_path / "rows")[:] == rows[:]
    before = sorted(tmp_path.iterdir())

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.data.rows.os.replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_rows(rows, tmp_path / "other")
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(UserError, match="other is missing; a resumed run needs its rows"):
        load_rows(tmp_path / "other")


def test_steps_visit_every_row_once_an_epoch_in_an_order_of_their_own():
    indices = np.array([3, 5, 7, 11, 13, 17, 19])
    epochs = [
        np.concatenate([rows_of_step(3 * epoch + i, indices, 2, seed=1) for i in range(3)])
        for epoch in range(2)
    ]
    for epoch in epochs:
        assert len(set(epoch)) == 6
        assert set(epoch) <= set(indices)
    assert list(epochs[0]) != list(epochs[1])
    np.testing.assert_array_equal(rows_of_step(4, indices, 2, seed=1), epochs[1][2:4])
    assert list(epochs[0]) != [*rows_of_step(0, indices, 6, seed=2)]


def test_held_out_rows_are_apart_and_depend_on_the_seed_only():
    training, held_out = split_rows(100, 0.05, seed=4)
    assert sorted([*training, *held_out]) == list(range(100))
    assert len(held_out) == 5
    np.testing.assert_array_equal(held_out, split_rows(100, 0.05, seed=4)[1])
    assert list(held_out) != list(split_rows(100, 0.05, seed=5)[1])
    assert len(split_rows(10, 0.0, seed=0)[1]) == 0
    with pytest.raises(UserError, match="1 rows leave none to train on"):
        split_rows(1, 0.01, seed=0)


def test_a_batch_is_split_over_data_and_fsdp_and_minus_one_counts_nothing(tokenizer, write):
    from jax.sharding import NamedSharding, PartitionSpec

    rows, _ = rows_of(tokenizer, write, count=40)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    indices = np.array([0, 1, 2, -1])
    batch = make_batch(rows, indices, sharding)
    assert batch.tokens_BT.sharding.shard_shape(batch.tokens_BT.shape) == (1, 64)
    np.testing.assert_array_equal(batch.tokens_BT[2], rows[2]["tokens"])
    assert np.asarray(batch.weights_BT)[:3].any(axis=1).all()
    assert not np.asarray(batch.weights_BT)[3].any()
