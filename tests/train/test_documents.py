"""What of a conversation enters the loss, template by template: against Hugging Face's own masks, and against written texts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import transformers
from chat_templates import (
    APPENDING,
    DEEPSEEK_R1,
    MISTRAL_NEMO,
    QWEN3,
    WITHOUT_END_OF_TURN,
    ChatTemplate,
    tokenizer_with,
)
from hf_tiny import expect_user_error
from sentencepiece_model import write_sentencepiece_model

from s2d_jax.formats.gguf import GGUFFile
from s2d_jax.text.tokenizer import Tokenizer
from train.data.documents import documents_of, training_turns

SYSTEM = {"role": "system", "content": "be brief"}


def chat(*texts: str):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


CONVERSATIONS = {
    "one turn": chat("one two", "three four"),
    "two turns": chat("one two", "three four", "five", "six the answer"),
    "three turns with a system message": [SYSTEM, *chat("one", "two", "one", "two", "one", "two")],
    "other scripts and lines": chat("naïve 👩‍👩‍👧 日本\n\nтри", "\n  def f():\n\treturn 'ß' 🏳️‍🌈", "x", "é\n\n1. two"),
    "white space around": chat(" one ", " two\n", "\tthree\n\n", "\n\nfour  "),
}  # fmt: skip


def spans_of(ids, mask, tokenizer: Tokenizer) -> list[str]:
    """The texts that the mask covers."""
    edges = np.flatnonzero(np.diff([0, *mask, 0])).reshape(-1, 2)
    return [tokenizer.decode(ids[a:b], skip_special_tokens=False) for a, b in edges]


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=list(CONVERSATIONS))
@pytest.mark.parametrize("template", APPENDING.values(), ids=list(APPENDING))
def test_masks_are_those_of_generation_tags(template: ChatTemplate, messages):
    """With the tags in the template, and without them, when they have to be found out."""
    tagged = transformers.PreTrainedTokenizerFast.apply_chat_template(
        tokenizer_with(template, template.tagged)._fast,
        messages,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    for text in (template.text, template.tagged):
        tokenizer = tokenizer_with(template, text)
        ((ids, mask),) = documents_of(messages, tokenizer)
        assert ids == list(tagged["input_ids"])
        assert [int(m) for m in mask] == list(tagged["assistant_masks"])
        spans = spans_of(ids, mask, tokenizer)
        assert len(spans) == sum(m["role"] == "assistant" for m in messages)
        assert all(span.endswith(template.eos) for span in spans)


@pytest.mark.parametrize("template", APPENDING.values(), ids=list(APPENDING))
def test_each_answer_stands_behind_the_prompt_that_decoding_would_have(template):
    tokenizer = tokenizer_with(template)
    messages = CONVERSATIONS["two turns"]
    ((ids, mask),) = documents_of(messages, tokenizer)
    starts = np.flatnonzero(np.diff([0, *mask]) == 1)
    for start, turns in zip(starts, (1, 3), strict=True):
        # As texts: a tokenizer may cut "\n\n" at the end of a prompt in another way than inside a text.
        prompt = tokenizer.render_chat(messages[:turns])
        assert tokenizer.decode(ids[:start], skip_special_tokens=False) == prompt


def test_a_tag_that_holds_more_than_the_answer_teaches_nothing_behind_the_end_of_turn():
    template = APPENDING["ChatML"]
    moved = template.text.replace("{#]#}", "").replace(
        "{{ '\\n' }}{% endfor %}", "{{ '\\n' }}{% endfor %}{#]#}"
    )
    assert moved != template.text
    tokenizer = tokenizer_with(template, moved)
    ((ids, mask),) = documents_of(chat("one", "two"), tokenizer)
    assert spans_of(ids, mask, tokenizer) == ["two<|im_end|>"]


THOUGHTS = chat("q1", "<think>\nt1\n</think>\n\na1", "q2", "<think>\nt2\n</think>\n\na2")
QWEN3_FIRST = "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n"
QWEN3_LATER = QWEN3_FIRST + "a1<|im_end|>\n<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n"
R1_FIRST = "<|begin|><|User|>q1<|Assistant|>"
R1_LATER = R1_FIRST + "a1<|end|><|User|>q2<|Assistant|>"

# For each template that rewrites earlier turns, the pieces of each sequence: those at odd places are trained on.
REWRITING = {
    "Qwen3 with thoughts": (
        QWEN3,
        THOUGHTS,
        [
            [QWEN3_FIRST, "<think>\nt1\n</think>\n\na1<|im_end|>", "\n"],
            [QWEN3_LATER, "<think>\nt2\n</think>\n\na2<|im_end|>", "\n"],
        ],
    ),
    "Qwen3, thoughts in other white space": (
        QWEN3,
        chat("q1", "<think>t1</think>a1"),
        [[QWEN3_FIRST, "<think>\nt1\n</think>\n\na1<|im_end|>", "\n"]],
    ),
    "Qwen3 without thoughts": (
        QWEN3,
        chat("q1", "a1", "q2", "a2"),
        [
            [QWEN3_FIRST, "<think>\n\n</think>\n\na1<|im_end|>", "\n"],
            [QWEN3_LATER, "<think>\n\n</think>\n\na2<|im_end|>", "\n"],
        ],
    ),
    "DeepSeek-R1's own answers, behind the opening of its prompt": (
        DEEPSEEK_R1,
        chat("q1", "t1</think>a1", "q2", "t2</think>a2"),
        [
            [R1_FIRST + "<think>\n", "t1</think>a1<|end|>"],
            [R1_LATER + "<think>\n", "t2</think>a2<|end|>"],
        ],
    ),
    "DeepSeek-R1, answers that repeat the opening": (
        DEEPSEEK_R1,
        chat("q1", "<think>\nt1</think>a1"),
        [[R1_FIRST + "<think>\n", "t1</think>a1<|end|>"]],
    ),
    "DeepSeek-R1 without thoughts": (
        DEEPSEEK_R1,
        chat("q1", "a1", "q2", "a2"),
        [[R1_FIRST, "a1<|end|>", "<|User|>q2<|Assistant|>", "a2<|end|>"]],
    ),
    "Mistral-Nemo, the system message in the last question": (
        MISTRAL_NEMO,
        [SYSTEM, *chat("q1", "a1", "q2", "a2")],
        [
            ["<s>[INST]be brief\n\nq1[/INST]", "a1</s>"],
            ["<s>[INST]q1[/INST]a1</s>[INST]be brief\n\nq2[/INST]", "a2</s>"],
        ],
    ),
    "Mistral-Nemo without a system message": (
        MISTRAL_NEMO,
        chat("q1", "a1", "q2", "a2"),
        [["<s>[INST]q1[/INST]", "a1</s>", "[INST]q2[/INST]", "a2</s>"]],
    ),
    "no end of turn": (
        WITHOUT_END_OF_TURN,
        chat("q1", "a1", "q2", "a2"),
        [
            [
                *("### user:\nq1\n\n### assistant:\n", "a1\n\n"),
                *("### user:\nq2\n\n### assistant:\n", "a2\n\n"),
            ]
        ],
    ),
}


@pytest.mark.parametrize(
    ("template", "messages", "expected"), REWRITING.values(), ids=list(REWRITING)
)
def test_templates_that_rewrite_earlier_turns_give_a_sequence_for_each_answer(
    template, messages, expected
):
    tokenizer = tokenizer_with(template)
    found = documents_of(messages, tokenizer)
    texts = [tokenizer.decode(ids, skip_special_tokens=False) for ids, _ in found]
    assert texts == ["".join(pieces) for pieces in expected]
    spans = [spans_of(ids, mask, tokenizer) for ids, mask in found]
    assert spans == [pieces[1::2] for pieces in expected]


def test_an_answer_that_was_cut_off_teaches_no_end_also_where_turns_are_rewritten():
    messages = [dict(message) for message in THOUGHTS]
    messages[1]["unfinished"] = messages[3]["unfinished"] = "yes"
    tokenizer = tokenizer_with(QWEN3)
    spans = [spans_of(ids, mask, tokenizer) for ids, mask in documents_of(messages, tokenizer)]
    assert spans == [[f"<think>\nt{i}\n</think>\n\na{i}"] for i in (1, 2)]


@pytest.mark.parametrize(
    "name", ["Vicuna", "Llama-2, strips", "Mistral, the system message in the first question"]
)
def test_sentencepiece_vocabularies(tmp_path, name):
    """Their tokens hold the space before a word, and a text's first word gets one of its own."""
    write_sentencepiece_model(tmp_path)
    tokenizer = Tokenizer.from_directory(tmp_path)
    template, messages = APPENDING[name], CONVERSATIONS["two turns"]
    tokenizer.chat_template = template.text
    ((ids, mask),) = documents_of(messages, tokenizer)
    fast = tokenizer._fast
    tagged = fast.apply_chat_template(
        messages,
        chat_template=template.tagged,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert ids == list(tagged["input_ids"])
    assert [int(m) for m in mask] == list(tagged["assistant_masks"])
    starts = np.flatnonzero(np.diff([0, *mask]) == 1)
    for start, turns in zip(starts, (1, 3), strict=True):
        assert ids[:start] == tokenizer.encode_chat(messages[:turns])


def test_a_template_that_writes_no_answers_is_refused():
    template = ChatTemplate("{{ messages|length }}", "</s>")
    with expect_user_error("the chat template writes no answers, so there is nothing to train on"):
        documents_of(chat("one", "two"), tokenizer_with(template))


def test_the_part_of_a_conversation_to_train_on():
    user, answer = chat("one", "two")
    empty_user, empty_answer = chat(" \n", "")
    assert training_turns([SYSTEM, user, answer]) == ([SYSTEM, user, answer], "")
    assert training_turns([answer, user, answer, user]) == ([user, answer], "")
    assert training_turns([user, answer, user, empty_answer]) == ([user, answer], "")
    assert training_turns([user, answer, empty_user, answer]) == ([user, answer], "")
    for bad in ([], [user], [answer], [SYSTEM]):
        assert training_turns(bad) == ([], "no_answer")
    for bad in ([user, user, answer], [user, answer, answer], [user, SYSTEM, answer]):
        assert training_turns(bad) == ([], "roles_do_not_alternate")
    for bad in ([empty_user, answer], [user, empty_answer, user, answer], [SYSTEM, empty_user, answer]):  # fmt: skip
        assert training_turns(bad) == ([], "empty_turn")


@pytest.mark.weights
def test_smollm2s_own_tokenizer_and_template(smollm2_path):
    """Against rendering turn by turn."""
    tokenizer = Tokenizer.from_gguf(GGUFFile(smollm2_path))
    prompts = Path(__file__).parents[2] / "configs" / "demo_prompts_train.jsonl"
    texts = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    for number in range(0, 48, 8):
        messages = chat(*texts[number : number + 6])
        ((ids, mask),) = documents_of(messages, tokenizer)
        assert ids == tokenizer.encode_chat(messages, add_generation_prompt=False)
        expected = np.zeros(len(ids), bool)
        for i in (1, 3, 5):
            start = len(tokenizer.encode_chat(messages[:i]))
            whole = tokenizer.encode_chat(messages[: i + 1], add_generation_prompt=False)
            assert whole[-2:] == [tokenizer.stop_token_ids[0], *tokenizer.encode("\n")]
            expected[start : len(whole) - 1] = True
        np.testing.assert_array_equal(mask, expected)
