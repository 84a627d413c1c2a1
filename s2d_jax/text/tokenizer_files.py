"""The tokenizer in a Hugging Face directory.

`tokenizer.json` says what a tokenizer does, and is used as it stands. transformers 5 would rather rebuild the pipeline from the
class that tokenizer_config.json names, and so lose what tokenizer.json says: the splitting of digits, a regular expression of
its own, normalisers. The class is used only where there is no such file. Python code that lies in a directory is never run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from s2d_jax.errors import UserError, shown
from s2d_jax.fields import Fields
from s2d_jax.files import (
    check_no_lfs_pointer,
    parse_json,
    read_json,
    read_text,
    regular_file,
)
from s2d_jax.text.templates import templates_in

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")

_REMEDY = "fetch it again"
_CONFIG, _SPECIAL, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
# Classes of transformers that take tokenizer.json as it stands.
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
# The special tokens that a class has where its tokenizer_config.json does not name any.
_TOKENS_OF_CLASS = {
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
}


@dataclasses.dataclass(frozen=True)
class FoundTokenizer:
    """What a directory holds.

    Attributes:
        fast: a fast tokenizer of transformers.
        templates: its chat templates by name.
        rebuilt_as: the class as which earlier versions rebuilt the tokenizer, and may have lost what tokenizer.json says; None
            where they took it as it stands, too.
    """

    fast: Any
    templates: dict[str, str]
    rebuilt_as: str | None


def find_tokenizer(directory: Path) -> FoundTokenizer:
    """The tokenizer of a Hugging Face directory.

    Raises:
        UserError: if there is none that can be read, or only one that needs Python code of its own.
    """
    config = _fields(directory / _CONFIG)
    templates = templates_in(directory, config.raw.get("chat_template"))
    named = config.text("tokenizer_class", None)
    if (directory / "tokenizer.json").exists():
        rebuilt_as = None if named is None or named in _PLAIN_CLASSES else named
        return FoundTokenizer(_as_it_stands(directory, config), templates, rebuilt_as)
    return FoundTokenizer(_built_by_class(directory), templates, None)


def _fields(file: Path) -> Fields:
    """The fields of a JSON object in a file; none where there is no file."""
    return Fields(read_json(file, _REMEDY) if file.exists() else {}, file, _REMEDY)


def _as_it_stands(directory: Path, config: Fields) -> Any:
    """The tokenizer that tokenizer.json describes, with the special tokens that the files beside it name."""
    from transformers import PreTrainedTokenizerFast

    backend = _backend(directory / "tokenizer.json")
    _add_tokens(backend, _added_by_id(directory, config))
    special = _named_tokens(directory, config, backend)
    _add_tokens(backend, ((None, token) for token in (*special.values(), *_extra_tokens(config))))
    tokens = {name: token.content for name, token in special.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **tokens, **_passed_on(directory, config, backend)
    )


def _backend(file: Path) -> Backend:
    text = read_text(file, _REMEDY)
    parse_json(text, str(file), _REMEDY)  # names the place of what is no JSON, or nested too deeply
    try:
        backend = Backend.from_str(text)
    except Exception as error:  # tokenizers raises nothing more specific
        raise UserError(
            f"{file} is no readable tokenizer ({_one_line(error)}); {_REMEDY}"
        ) from None
    # A text is never cut or filled up here.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _added_by_id(directory: Path, config: Fields) -> Iterator[tuple[int | None, AddedToken]]:
    """The added tokens that files beside tokenizer.json list with their ids, in the order of these."""
    listed = config.fields("added_tokens_decoder", None)
    if listed is not None:
        known = [(_id(listed, key, key), _token(listed, key)) for key in listed.raw]
    else:
        added = _fields(directory / _ADDED)
        known = [
            (added.integer(token, 0), AddedToken(token, normalized=True)) for token in added.raw
        ]
    yield from sorted(known, key=lambda pair: pair[0])


def _id(fields: Fields, key: str, value: str) -> int:
    if not (value.isascii() and value.isdigit() and len(value) < 10):
        raise UserError(f"{fields.where}: {shown(key)} must be the id of a token; {_REMEDY}")
    return int(value)


def _named_tokens(directory: Path, config: Fields, backend: Backend) -> dict[str, AddedToken]:
    """The special tokens by their names, such as eos_token; as in transformers, the older special_tokens_map.json counts only
    where tokenizer_config.json does not list the added tokens."""
    sources = [config]
    if config.raw.get("added_tokens_decoder") is None:
        sources.insert(0, _fields(directory / _SPECIAL))
    found = {}
    for name in _NAMES:
        source = next((source for source in sources if source.raw.get(name) is not None), None)
        if source is not None:
            found[name] = _token(source, name)
    by_class = (config.text("tokenizer_class", None) or "").removesuffix("Fast")
    for name, token in _TOKENS_OF_CLASS.get(by_class, {}).items():
        is_named = any(name in source.raw for source in sources)
        if not is_named and backend.token_to_id(token) is not None:
            found[name] = AddedToken(token, special=True, normalized=False)
    return found


def _extra_tokens(config: Fields) -> Iterator[AddedToken]:
    """Further special tokens, which have no names."""
    for name in ("additional_special_tokens", "extra_special_tokens"):
        value = config.raw.get(name)
        entries = value if isinstance(value, dict) else dict(enumerate(config.list(name, [])))
        listed = Fields(
            {str(key): entry for key, entry in entries.items()}, f"{config.where}: {name}", _REMEDY
        )
        yield from (_token(listed, key) for key in listed.raw)


def _token(fields: Fields, name: str) -> AddedToken:
    """A token that a file tells as a text, or as an object with `content` and flags."""
    if isinstance(fields.raw[name], str):
        return AddedToken(fields.raw[name], special=True, normalized=False)
    if not isinstance(fields.raw[name], dict):
        raise fields.wrong(name, "a token: a text, or an object with content")
    told = fields.fields(name)
    flags = {flag: told.flag(flag, False) for flag in _FLAGS}
    return AddedToken(told.text("content"), special=told.flag("special", True), **flags)


def _add_tokens(backend: Backend, tokens: Iterator[tuple[int | None, AddedToken]]) -> None:
    """Adds the tokens that tokenizer.json does not list as added.

    Raises:
        UserError: for a token that gets another id than a file says.
    """
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for expected, token in tokens:
        if token.content in known or not token.content:
            continue
        known.add(token.content)
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        found = backend.token_to_id(token.content)
        if expected is not None and found != expected:
            raise UserError(
                f"token {shown(token.content)} has id {expected} beside tokenizer.json, which makes it {found}; "
                "fetch the tokenizer's files again"
            )


def _passed_on(directory: Path, config: Fields, backend: Backend) -> dict[str, Any]:
    """Settings that an export hands on to users of transformers; none of them changes an id here."""
    found: dict[str, Any] = {
        "clean_up_tokenization_spaces": config.flag("clean_up_tokenization_spaces", False)
    }
    length = config.number("model_max_length", default=None)
    if length is not None:
        found["model_max_length"] = int(length)
    for name in ("padding_side", "truncation_side"):
        side = config.text(name, None)
        if side is not None and side not in ("left", "right"):
            raise config.wrong(name, "left or right")
        found |= {} if side is None else {name: side}
    # Where tokenizer.json is silent about BOS and EOS, tokenizer_config.json decides.
    if backend.post_processor is None:
        found |= {name: config.flag(name, False) for name in ("add_bos_token", "add_eos_token")}
    return found


def _built_by_class(directory: Path) -> Any:
    """The tokenizer of files that only a class of transformers reads: a SentencePiece model, or vocab.json and merges.txt."""
    from transformers import AutoTokenizer

    _check_sentencepiece(directory)
    for name in (_CONFIG, _SPECIAL, _ADDED, "config.json", "vocab.json"):
        _fields(directory / name)
    if (directory / "merges.txt").exists():
        read_text(directory / "merges.txt", _REMEDY)
    try:
        fast = AutoTokenizer.from_pretrained(
            str(directory), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # whatever a class raises on the files of a user
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{directory} has a tokenizer that needs Python code of its own, which is never run; add its tokenizer.json"
            ) from None
        raise UserError(
            f"{directory} holds no readable tokenizer ({_one_line(error)}); add its tokenizer.json"
        ) from error
    if not fast.is_fast:
        raise UserError(
            f"{directory} has a tokenizer of the class {type(fast).__name__}, which has no tokenizer.json; add it"
        )
    return fast


def _check_sentencepiece(directory: Path) -> None:
    """Raises UserError for an unreadable tokenizer.model; transformers would take it for tiktoken's, and ask for tiktoken."""
    file = directory / "tokenizer.model"
    if not file.exists():
        return
    check_no_lfs_pointer(regular_file(file, _REMEDY))
    try:
        sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{file} is no readable SentencePiece model ({_one_line(error)}); fetch it again, or "
            "add the model's tokenizer.json"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
