"""What counts as a prompt: a text, a conversation, or token ids; and what counts as several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypeGuard

import jax
import numpy as np

from s2d_jax.errors import UserError, shown
from s2d_jax.files import whole_characters
from s2d_jax.text.messages import Message, text_of
from s2d_jax.text.tokenizer import Tokenizer

TokenIds: TypeAlias = Sequence[int] | np.ndarray | jax.Array
"""Token ids of one text; arrays are 1-D, of any integer type."""

Prompt: TypeAlias = str | Sequence[Message] | TokenIds
"""A text, a conversation, or token ids."""

Prompts: TypeAlias = Prompt | Sequence[Prompt]
"""One prompt, a sequence of them, or a 2-D array of token ids with one in each row."""

OnePrompt: TypeAlias = str | list[Message] | list[int]
"""A prompt in plain Python."""

_EXPECTED = "a text, a list of messages with role and content, token ids"


def split_prompts(prompts: Prompts) -> list[OnePrompt]:
    """The prompts one by one, in plain Python. A single prompt becomes a list of one.

    Raises:
        UserError: for anything else, and for no prompts at all.
    """
    if (one := one_prompt(prompts)) is not None:
        return [one]
    entries = _entries(prompts)
    if entries is None:
        raise _refused(prompts)
    if not entries:
        raise UserError(f"there are no prompts; give at least one: {_EXPECTED}")
    found: list[OnePrompt] = []
    for entry in entries:
        if (one := [] if _is_empty(entry) else one_prompt(entry)) is None:
            alone = _entries(entry) is None and not _is_id(entry)
            raise _refused(entry if alone else prompts)
        found.append(one)
    return found


def one_prompt(value: Any) -> OnePrompt | None:
    """The value as one prompt, in plain Python; None if it is not one."""
    if isinstance(value, str):
        return whole_characters(str(value))
    if _is_array(value):
        return value.tolist() if value.ndim == 1 and value.size and _has_integers(value) else None
    entries = _entries(value)
    if not entries:
        return None
    if all(map(_is_id, entries)):
        return [int(entry) for entry in entries]
    return list(map(_message, entries)) if all(map(_is_message, entries)) else None


def is_ids(prompt: OnePrompt) -> TypeGuard[list[int]]:
    """Whether a prompt of `split_prompts` is token ids; an empty list is."""
    return not isinstance(prompt, str) and not any(isinstance(entry, dict) for entry in prompt[:1])


def check_ids(
    ids: Sequence[int],
    vocab_size: int,
    name: str = "a prompt",
    tokenizer: Tokenizer | None = None,
) -> None:
    """Raises UserError for no ids, or ids outside a model's vocabulary.

    Args:
        ids: the token ids.
        vocab_size: the model's, and so the rows of its embedding.
        name: has the ids; messages begin with it.
        tokenizer: gives the text of a token outside.
    """
    if not ids:
        raise UserError(f"{name} is empty: it gives no token; give at least one")
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        outside = next(token for token in ids if not 0 <= token < vocab_size)
        token = None if tokenizer is None else tokenizer.token(outside)
        named = "" if token is None else f" ({shown(token)})"
        raise UserError(
            f"{name} has token id {shown(outside)}{named}; the model's ids are 0 to {vocab_size - 1}"
        )


def names_of_prompts(count: int) -> list[str]:
    """What messages call each of `count` prompts that were given together."""
    return ["the prompt"] if count == 1 else [f"prompt {i} of {count}" for i in range(1, count + 1)]


def _entries(value: Any) -> list[Any] | None:
    """The entries of a sequence, or of an array of integers; None for anything else."""
    if _is_array(value):
        return list(np.asarray(value)) if value.ndim in (1, 2) and _has_integers(value) else None
    is_sequence = isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)
    return list(value) if is_sequence else None


def _is_empty(value: Any) -> bool:
    return not isinstance(value, str) and _entries(value) == []


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray | jax.Array)


def _has_integers(array: Any) -> bool:
    return np.issubdtype(array.dtype, np.integer)


def _is_id(value: Any) -> bool:
    if _is_array(value):
        return value.ndim == 0 and _has_integers(value)
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("role"), str)
        and text_of(value.get("content")) is not None
    )


def _message(value: Mapping[str, Any]) -> dict[str, Any]:
    """A message in plain Python, with its content as one text."""
    texts = {"role": value["role"], "content": text_of(value["content"]) or ""}
    return {**value, **{key: whole_characters(str(text)) for key, text in texts.items()}}


def _refused(value: Any) -> UserError:
    """The error for a value that is neither one prompt nor several."""
    remedy = f"give {_EXPECTED}, or a list of these"
    if isinstance(value, Mapping):
        remedy = "a conversation is a list of messages: [{'role': 'user', 'content': 'Why?'}]"
    elif isinstance(value, bytes | bytearray):
        remedy = "decode it to a text first: value.decode()"
    return UserError(f"{shown(value)} ({type(value).__name__}) is no prompt; {remedy}")
