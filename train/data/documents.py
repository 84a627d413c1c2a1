"""From a conversation to the token sequences to train on, and which of their tokens the assistant writes.

The rule is that of decoding. The chat template makes a prompt of the turns before an answer; behind it stand the answer and its
end-of-turn token, and these two enter the loss. Most templates only append, so all answers of a conversation fit into one
sequence. Some templates rewrite earlier turns once the conversation goes on: they drop thoughts (Qwen3, DeepSeek-R1), or move
the system message to the last question (Mistral). Then an answer gets a sequence of its own, unless a later sequence contains
it, and the prompt before it, unchanged.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence

from s2d_jax.errors import UserError
from s2d_jax.text.messages import Message, usable_turns
from s2d_jax.text.tokenizer import Tokenizer

# Stands in for an answer, to see what a template writes around one.
_PROBE = "probe7c1e5"


def training_turns(messages: list[Message]) -> tuple[list[Message], str]:
    """The part of a conversation to train on, up to its last answer; or no turns and the reason, as in `usable_turns`."""
    kept = list(messages)
    while kept and kept[-1]["role"] != "assistant":
        kept.pop()
    if not kept:
        return [], "no_answer"
    turns, reason = usable_turns(kept)
    if turns and turns[-1]["role"] == "user":  # its answer is empty
        turns.pop()
        if not any(turn["role"] == "assistant" for turn in turns):
            return [], "empty_turn"
    return turns, reason


@dataclasses.dataclass(frozen=True)
class _Answer:
    """An answer in the text that ends with it.

    Attributes:
        text: prompt, answer, and what the template writes behind it.
        start: where the answer begins, right after the prompt.
        content_end: where its content ends.
        end: where its end-of-turn token ends; `content_end` if the template has no such token.
        cut_off: the answer was cut off at `content_end`, so no end of turn is learned there.
    """

    text: str
    start: int
    content_end: int
    end: int
    cut_off: bool

    @property
    def needed(self) -> str:
        """What another text must begin with to contain this answer unchanged."""
        return self.text[: self.content_end if self.cut_off else self.end]


def documents_of(
    messages: Sequence[Message], tokenizer: Tokenizer
) -> list[tuple[list[int], list[bool]]]:
    """Token ids, and which of them the assistant writes, for each sequence that a conversation becomes.

    Args:
        messages: as `training_turns` returns them.
        tokenizer: the model's.

    Raises:
        UserError: if the template refuses the conversation.
    """
    plain = [{key: message[key] for key in ("role", "content")} for message in messages]
    texts: list[tuple[str, list[_Answer]]] = []
    for i in reversed(range(len(plain))):
        if plain[i]["role"] != "assistant":
            continue
        cut_off = bool(messages[i].get("unfinished"))
        answer = _answer(plain[:i], plain[i]["content"], tokenizer, cut_off)
        if texts and texts[-1][0].startswith(answer.needed):
            texts[-1][1].append(answer)
        else:
            texts.append((answer.text, [answer]))
    return [_masked(text, answers, tokenizer) for text, answers in reversed(texts)]


def _answer(history: list[Message], content: str, tokenizer: Tokenizer, cut_off: bool) -> _Answer:
    """The text of `history` and an answer: the template's own text if the answer follows the prompt there, else composed."""
    prompt = tokenizer.render_chat(history, add_generation_prompt=True)
    text = _rendered(history, content, tokenizer)
    probe = _rendered(history, _PROBE, tokenizer)
    found = probe.rfind(_PROBE)
    if found < 0:
        raise UserError(
            "the chat template writes no answers, so there is nothing to train on; use another template"
        )
    before, closing = probe[:found], probe[found + len(_PROBE) :]
    content_end = len(text) - len(closing) if text.endswith(closing) else len(text)
    body = content.strip()  # many templates strip it
    written = text[:content_end].rstrip()
    if text.startswith(prompt) and _squashed(written).endswith(_squashed(body)):
        start = len(prompt)
    elif written.endswith(body) and prompt.startswith(written[: -len(body)].rstrip()):
        # The prompt ends with an opening, such as that of a thought, which this answer does not have.
        start = len(written[: -len(body)].rstrip())
    else:
        # The template drops thoughts, or rewrites earlier turns once there is an answer: write the answer as the model would.
        opened, start = _behind_prompt(prompt, before, content)
        content_end = len(opened)
        text = opened + closing
    end = content_end + _end_of_turn(text[content_end:], tokenizer)
    return _Answer(text, start, content_end, end, cut_off)


def _rendered(history: list[Message], content: str, tokenizer: Tokenizer) -> str:
    answer = {"role": "assistant", "content": content}
    return tokenizer.render_chat([*history, answer], add_generation_prompt=False)


def _squashed(text: str) -> str:
    return "".join(text.split())


def _shared_length(text: str, other: str) -> int:
    """How many leading characters are equal."""
    if text.startswith(other):
        return len(other)
    pairs = enumerate(zip(text, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(text), len(other)))


def _behind_prompt(prompt: str, before: str, content: str) -> tuple[str, int]:
    """Prompt and content in one text, and where the answer begins; `before` is what the template writes before answers."""
    opening = prompt[_shared_length(prompt, before) :]
    if opening.strip() and content.lstrip().startswith(opening.strip()):
        # The answer repeats the opening that the prompt ends with.
        content = content.lstrip()[len(opening.strip()) :].lstrip("\n")
    lead = before[len(before.rstrip()) :] if prompt == prompt.rstrip() else ""
    return prompt + lead + content, len(prompt)


def _end_of_turn(closing: str, tokenizer: Tokenizer) -> int:
    """How many characters of `closing`, which follows an answer's content, the model writes: up to its first stop token."""
    ids, ends = tokenizer.encode_with_ends(closing)
    stops = set(tokenizer.stop_token_ids)
    return next((end for token, end in zip(ids, ends, strict=True) if token in stops), 0)


def _masked(
    text: str, answers: Sequence[_Answer], tokenizer: Tokenizer
) -> tuple[list[int], list[bool]]:
    """Ids of `text`, and which of them belong to `answers`.

    An answer ends with the first token that stops decoding. If the template has none, it ends with the template's text of the
    answer. An answer that was cut off ends with its content.
    """
    ids, ends = tokenizer.encode_with_ends(text)
    stops, mask = set(tokenizer.stop_token_ids), [False] * len(ids)
    for answer in answers:
        limit = answer.content_end if answer.cut_off else _shared_length(text, answer.text)
        first = bisect.bisect_right(ends, answer.start)
        last = bisect.bisect_right(ends, limit)
        last = next((j + 1 for j in range(first, last) if ids[j] in stops), last)
        mask[first:last] = [True] * (last - first)
    return ids, mask
