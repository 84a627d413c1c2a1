"""Messages: the turns that rows of public chat files hold, read where they can be read in one way only."""

from __future__ import annotations

from typing import Any

from s2d_jax.errors import UserError, shown
from s2d_jax.files import parse_json

# {"role": ..., "content": ...}, and "unfinished": "yes" for an answer that was cut off.
Message = dict[str, str]

_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot", "ai"), "assistant"
    ),
    **dict.fromkeys(("system", "developer"), "system"),
}
# Fields of a row that hold its turns; fields of a turn that hold its role and its text.
_TURNS, _ROLE, _CONTENT = (
    ("messages", "conversations", "conversation"),
    ("role", "from"),
    ("content", "value"),
)


class UnusableRow(UserError):
    """A row that is whole but holds nothing to use.

    Attributes:
        reason: the name of a count of `train.data.report.SourceReport`.
    """

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


def text_of(content: Any) -> str | None:
    """The text of a message's content: a text, or a list of text parts, which are joined. None for anything else.

    >>> text_of([{"type": "text", "text": "Why is "}, {"type": "text", "text": "the sky blue?"}])
    'Why is the sky blue?'
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple) or not content:
        return None
    texts = [
        part["text"]
        for part in content
        if isinstance(part, dict)
        and part.get("type") == "text"
        and isinstance(part.get("text"), str)
    ]
    return "".join(texts) if len(texts) == len(content) else None


def turns_in(row: Any) -> list[Any] | None:
    """The turns of a row as they are; None if it holds no conversation.

    They are the first list of `messages`, `conversations` and `conversation` that is not empty, or what `prompt` and
    `completion` hold. A list or the whole row may be written as JSON in a text.
    """
    row = _unpacked(row)
    if isinstance(row, list):
        return row if row and all(isinstance(turn, dict) for turn in row) else None
    if not isinstance(row, dict):
        return None
    found = [turns for name in _TURNS if (turns := _listed(row.get(name))) is not None]
    if found:
        return next(filter(None, found), [])
    if row.get("prompt") is None or row.get("completion") is None:
        return None
    return [*_side(row["prompt"], "user"), *_side(row["completion"], "assistant")]


def _unpacked(value: Any) -> Any:
    """What a text holds that begins as JSON does; anything else as it is."""
    if not (isinstance(value, str) and value.lstrip()[:1] in ("[", "{")):
        return value
    try:
        return parse_json(value, "")
    except UserError:
        return value


def _listed(value: Any) -> list[Any] | None:
    value = _unpacked(value)
    if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
        # `datasets` keeps a sequence of objects as an object of sequences.
        return [dict(zip(value, turn, strict=False)) for turn in zip(*value.values(), strict=False)]
    return value if isinstance(value, list) else None


def _side(value: Any, role: str) -> list[Any]:
    """`prompt` or `completion`: messages, or the content of one."""
    is_messages = isinstance(value, list) and text_of(value) is None
    return value if is_messages else [{"role": role, "content": value}]


def told_row(row: Any) -> str:
    """What a row is, for messages about one that holds no conversation."""
    return f"an object of {shown(list(row))}" if isinstance(row, dict) else shown(row)


def read_turn(turn: Any) -> tuple[str, str | None]:
    """Role and text of a turn, `role` and `content` or `from` and `value`.

    Returns:
        The role, which is one of system, user and assistant wherever it has a name that is known for one of these, and else as
        it is ("" if there is none); and the text, None if there is none.
    """
    if not isinstance(turn, dict):
        return "", None
    role = next((turn[name] for name in _ROLE if turn.get(name) is not None), "")
    content = next((turn[name] for name in _CONTENT if turn.get(name) is not None), None)
    role = role.strip() if isinstance(role, str) else ""
    return _ROLES.get(role.lower(), role), text_of(content)


def parse_messages(row: Any, where: str) -> list[Message]:
    """The messages of a row: system, user and assistant.

    Args:
        row: as `read_rows` gives it.
        where: where it stands.

    Raises:
        UnusableRow: beginning with `where`, for a row without a conversation, other roles, or content that is not text.
    """
    turns = turns_in(row)
    if turns is None:
        raise UnusableRow(
            f"{where}: expected a list `messages` or `conversations`, or `prompt` and `completion`; it is {told_row(row)}",
            "no_conversation",
        )
    messages = []
    for number, turn in enumerate(turns, start=1):
        role, content = read_turn(turn)
        if content is None:
            raise UnusableRow(
                f"{where}: turn {number} needs a role and text, it is {shown(turn)}; repair or remove the row",
                "not_text",
            )
        if role not in _ROLES.values():
            raise UnusableRow(
                f"{where}: turn {number} has the role {shown(role)}; use one of {', '.join(_ROLES)}",
                "other_roles",
            )
        messages.append({"role": role, "content": content})
    finished = row.get("finished") if isinstance(row, dict) else None
    _mark_unfinished(messages, [] if finished is None else finished, where)
    return messages


def _mark_unfinished(messages: list[Message], finished: Any, where: str) -> None:
    answers = [message for message in messages if message["role"] == "assistant"]
    flags = finished if isinstance(finished, list) else [None]
    if len(flags) > len(answers) or not all(isinstance(flag, bool) for flag in flags):
        raise UnusableRow(
            f"{where}: finished={shown(finished)} must be a list of true or false, one for each of the last answers",
            "unclear_finished",
        )
    for message, ended in zip(reversed(answers), reversed(flags), strict=False):
        if not ended:
            message["unfinished"] = "yes"


def usable_turns(messages: list[Message]) -> tuple[list[Message], str]:
    """An optional system message, then user and assistant in turn, as a chat template takes them.

    Assistant turns before the first question are left out (half of ShareGPT's exports start in mid-conversation), and so is
    everything from the first empty turn on.

    Returns:
        The turns and ""; a last question without an answer stays. If nothing is usable, no turns and the reason: the name of
        a count of `train.data.report.SourceReport`.
    """
    system = messages[:1] if messages and messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    while turns and turns[0]["role"] == "assistant":
        turns = turns[1:]
    if any(turn["role"] != ("user", "assistant")[i % 2] for i, turn in enumerate(turns)):
        return [], "roles_do_not_alternate"
    if not turns:
        return [], "no_answer"
    filled = next((i for i, turn in enumerate(turns) if not turn["content"].strip()), len(turns))
    if filled == 0:
        return [], "empty_turn"
    return system + turns[:filled], ""
