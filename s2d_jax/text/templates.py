"""Chat templates: where a model keeps them, which of them is used, and the one that stands in where there is none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from s2d_jax.errors import UserError, printable, shown
from s2d_jax.files import expanded, read_text

DEFAULT = "default"
"""The name of the template that is used unless another is chosen."""

VICUNA = "vicuna"
"""The name under which the template of `VICUNA_TEMPLATE` is chosen."""

# FastChat's `SeparatorStyle.ADD_COLON_TWO` with the separators " " and "</s>": a space after the system text and after each
# user's turn, the EOS right after each answer. Source: `Conversation.get_prompt` in fastchat/conversation.py.
VICUNA_TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}"
    '{% set system = "A chat between a curious user and an artificial intelligence assistant. " ~ '
    '"The assistant gives helpful, detailed, and polite answers to the user\'s questions." %}'
    "{% set turns = messages %}"
    "{% endif %}"
    "{{ system ~ ' ' }}"
    "{% for message in turns %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' ~ message['content'] ~ ' ' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ 'ASSISTANT: ' ~ message['content'] ~ eos_token }}"
    "{% else %}{{ raise_exception('role ' ~ message['role'] ~ ' is unknown') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

_REMEDY = "fetch it again"
_GGUF_KEY = "tokenizer.chat_template"


def named_templates(value: Any, where: str | Path) -> dict[str, str]:
    """The templates of a field `chat_template`: none, a text, or texts with names.

    Raises:
        UserError: for anything else.
    """
    if value is None or value in ("", [], {}):
        return {}
    if isinstance(value, str):
        return {DEFAULT: value}
    pairs: list[tuple[Any, Any]] = (
        list(value.items()) if isinstance(value, Mapping) else [(None, value)]
    )
    if isinstance(value, list) and all(isinstance(entry, Mapping) for entry in value):
        pairs = [(entry.get("name"), entry.get("template")) for entry in value]
    if not all(isinstance(name, str) and isinstance(text, str) for name, text in pairs):
        raise UserError(
            f"{where}: chat_template={shown(value)} must be a text, or a list of objects with name and template; {_REMEDY}"
        )
    return {str(name): text for name, text in pairs}


def templates_in(directory: Path, in_config: Any) -> dict[str, str]:
    """The templates of a Hugging Face directory by name: files of their own, or else those of tokenizer_config.json.

    Args:
        directory: may hold chat_template.jinja, and additional_chat_templates/NAME.jinja.
        in_config: the field `chat_template` of tokenizer_config.json.

    Raises:
        UserError: for what cannot be read.
    """
    files = {
        file.stem: file for file in sorted(directory.glob("additional_chat_templates/*.jinja"))
    }
    if (default := directory / "chat_template.jinja").exists():
        files = {DEFAULT: default, **files}
    if files:
        return {name: read_text(file, _REMEDY) for name, file in files.items()}
    return named_templates(in_config, directory / "tokenizer_config.json")


def templates_in_gguf(metadata: Mapping[str, Any], where: str | Path) -> dict[str, str]:
    """The templates in a GGUF file by name: `tokenizer.chat_template`, and others behind its name and a dot.

    Raises:
        UserError: for a template that is no text.
    """
    named = {
        key.removeprefix(f"{_GGUF_KEY}."): metadata[key]
        for key in metadata
        if key.startswith(f"{_GGUF_KEY}.")
    }
    default = metadata.get(_GGUF_KEY)
    if default is not None and not isinstance(default, str):
        raise UserError(f"{where}: {_GGUF_KEY}={shown(default)} must be a text; {_REMEDY}")
    return named_templates({**({DEFAULT: default} if default else {}), **named}, where)


def default_template(templates: Mapping[str, str]) -> str:
    """The template that is used unless another is chosen: `default`, the only one, or Vicuna's where there is none.

    Several templates of which none is `default` give one that refuses every conversation and names them: a choice between
    them would be a guess.
    """
    if not templates:
        return VICUNA_TEMPLATE
    if len(templates) == 1 or DEFAULT in templates:
        return templates.get(DEFAULT) or next(iter(templates.values()))
    reason = f"there are the templates {_names(templates)}, none of them is the default; choose one with --chat-template"
    return f"{{{{ raise_exception({json.dumps(reason)}) }}}}"


def chosen_template(templates: Mapping[str, str], choice: str) -> str:
    """The template that `choice` names: one of the model's, `vicuna`, or a file that holds one.

    Raises:
        UserError: if it is none of these.
    """
    if choice in templates:
        return templates[choice]
    if choice == VICUNA:
        return VICUNA_TEMPLATE
    path = expanded(choice)
    known = _names([*templates, VICUNA])
    if "\0" in choice or not path.exists():
        raise UserError(
            f"chat template {shown(choice)} is neither a file nor one of the names known here; give a file, or one of {known}"
        )
    return read_text(path, f"give a file that holds a chat template, or one of {known}")


def _names(names: Mapping[str, str] | list[str]) -> str:
    return ", ".join(printable(name) for name in names)
