"""Text to tokens and back, chat templates, and whether two models use the same tokens.

The only place that touches Hugging Face tokenizers.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import sentencepiece

from s2d_jax.errors import UserError, shown
from s2d_jax.formats.eos_ids import merged_ids, saved_eos_token_ids
from s2d_jax.formats.gguf import GGUFFile
from s2d_jax.formats.gguf_tokenizer import tokenizer_from_gguf
from s2d_jax.progress.activity import activity
from s2d_jax.progress.state import Activity

# transformers advises to install PyTorch when it is imported; nothing here needs it. Importing it takes seconds, so it is
# imported when a tokenizer is made.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")

# Special tokens that end an answer in the supported families, beside the tokenizer's own EOS.
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>")

# Names of entries that only pad a vocabulary, as in `[PAD151665]` or `<|reserved_special_token_3|>`; in brackets, because
# `padding` and `extra` are also parts of words.
_PADDING = re.compile(
    r"[<\[]\|?(pad|padding|unused|dummy|reserved|extra|placeholder)([_ -]?(special|token|id))*[_ -]?\d*\|?[>\]]",
    re.IGNORECASE,
)

# Tokens of a single byte in vocabularies with byte fallback.
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")

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


class Tokenizer:
    """A Hugging Face fast tokenizer with a chat template and the tokens that end an answer.

    Args:
        fast: a tokenizer of transformers.
        stop_token_ids: ids that end an answer, beside its EOS and the usual end-of-turn tokens.

    Attributes:
        chat_template: the tokenizer's own Jinja template, else Vicuna's.
        stop_token_ids: all ids that end an answer.
    """

    def __init__(self, fast: Any, stop_token_ids: Sequence[int] = ()):
        self._fast = fast
        self.chat_template: str = fast.chat_template or VICUNA_TEMPLATE
        special = {str(t): i for i, t in fast.added_tokens_decoder.items() if t.special}
        end_of_turn = [special[token] for token in END_OF_TURN if token in special]
        self.stop_token_ids = merged_ids(fast.eos_token_id, stop_token_ids, end_of_turn)

    def __repr__(self) -> str:
        ends = shown(self._fast.convert_ids_to_tokens(list(self.stop_token_ids)), 40)
        template = "its own" if self._fast.chat_template else "Vicuna's"
        return f"Tokenizer: {len(self._fast)} tokens, answers end with {ends}, chat template {template}"

    @classmethod
    def from_directory(cls, directory: str | Path) -> Tokenizer:
        """Reads the tokenizer of a Hugging Face directory, or what `save` wrote.

        Raises:
            UserError: if transformers cannot read one.
        """
        _check_sentencepiece(Path(directory))
        try:
            with _reading():
                from transformers import AutoTokenizer

                fast = AutoTokenizer.from_pretrained(str(directory))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(
                f"{directory} holds no readable tokenizer ({reason}); add its tokenizer.json"
            ) from error
        return cls(fast, saved_eos_token_ids(Path(directory)))

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> Tokenizer:
        """Builds the tokenizer that a GGUF file describes; torch is not needed.

        Raises:
            UserError: for an unsupported kind of tokenizer.
        """
        with _reading():
            from transformers import PreTrainedTokenizerFast

            backend, special_tokens = tokenizer_from_gguf(file)
            fast = PreTrainedTokenizerFast(
                tokenizer_object=backend,
                clean_up_tokenization_spaces=False,
                chat_template=file.metadata.get("tokenizer.chat_template"),
                **special_tokens,
            )
        ids = (file.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot"))
        return cls(fast, merged_ids(*ids))

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`; special tokens written in it are recognised."""
        return self._fast.encode(text, add_special_tokens=add_special_tokens, verbose=False)

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """What `encode` gives, and for each token the index in `text` at which its characters end."""
        encoded = self._fast(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return list(encoded["input_ids"]), [end for _, end in encoded["offset_mapping"]]

    def fingerprint(self) -> str:
        """A SHA-256 that changes with anything that decides which ids a conversation becomes."""
        parts = [
            self._fast.backend_tokenizer.to_str(),
            self.chat_template,
            json.dumps(self._fast.special_tokens_map, default=str, sort_keys=True),
            str(self.stop_token_ids),
        ]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; ids beyond the vocabulary are left out."""
        return self._fast.decode(
            [int(i) for i in ids],
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )

    def decode_settled(self, ids: Sequence[int]) -> str:
        """The beginning of the text of `ids` that no further token can change.

        It leaves out a last character whose bytes are incomplete, and byte tokens (`<0xE2>`) at the end: only at the end of
        their run is it known whether they form characters.
        """
        ids = list(ids)
        while ids and ids[-1] not in self._whole_ids:
            ids.pop()
        return self.decode(ids).rstrip("\N{REPLACEMENT CHARACTER}")

    @functools.cached_property
    def _whole_ids(self) -> frozenset[int]:
        """The ids that end a run of byte tokens: all but byte tokens themselves and special tokens, which leave no text."""
        special = {i for i, token in self._fast.added_tokens_decoder.items() if token.special}
        tokens = self.vocabulary().items()
        return frozenset(i for token, i in tokens if not _BYTE.fullmatch(token)) - special

    def render_chat(
        self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as one string, as the chat template writes it.

        Args:
            messages: `{"role": "system" | "user" | "assistant", "content": text}` in order.
            add_generation_prompt: end with the header of an answer.

        Raises:
            UserError: if the template refuses the conversation.
        """
        try:
            return self._fast.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                chat_template=self.chat_template,
            )
        except (jinja2.TemplateError, TypeError, IndexError) as error:
            raise UserError(
                f"the chat template refuses the conversation ({error}); give messages with role and content"
            ) from error

    def encode_chat(
        self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of `render_chat`; the template itself writes BOS where the model wants it."""
        return self.encode(self.render_chat(messages, add_generation_prompt))

    def vocabulary(self) -> dict[str, int]:
        """Every token's string -> its id."""
        return self._fast.get_vocab()

    def special_token_ids(self) -> tuple[int, ...]:
        """Ascending ids of all tokens that plain text never becomes: control tokens, tags, and those that end an answer."""
        return tuple(sorted({*self._fast.added_tokens_decoder, *self.stop_token_ids}))

    def save(self, directory: str | Path) -> None:
        """Writes what `from_directory` reads.

        That is tokenizer.json, tokenizer_config.json (with the chat template) and, for the stop tokens, generation_config.json.

        Raises:
            OSError: if the disk is full or not writable.
        """
        directory = Path(directory)
        own_template = self._fast.chat_template
        self._fast.chat_template = self.chat_template
        try:
            self._fast.save_pretrained(str(directory), save_jinja_files=False)
        except Exception as error:
            # The Rust library raises a bare Exception; the system's error number is only in its text.
            found = re.search(r"\(os error (\d+)\)", str(error))
            if isinstance(error, OSError) or found is None:
                raise
            number = int(found[1])
            raise OSError(number, os.strerror(number), str(directory)) from error
        finally:
            self._fast.chat_template = own_template
        file = directory / "tokenizer_config.json"
        saved = json.loads(file.read_text(encoding="utf-8"))
        # Readable by transformers 4 and 5 alike, and both then take tokenizer.json as it stands.
        saved["tokenizer_class"] = "PreTrainedTokenizerFast"
        file.write_text(json.dumps(saved, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        generation = {"eos_token_id": list(self.stop_token_ids)}
        (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def _reading() -> contextlib.AbstractContextManager[Activity]:
    """Shows that a tokenizer is read; the first in a process takes longest, because it imports transformers."""
    key = "" if "transformers.tokenization_utils_base" in sys.modules else "tokenizer"
    return activity("reading the tokenizer", key=key)


def _check_sentencepiece(directory: Path) -> None:
    """Raises UserError for an unreadable tokenizer.model; transformers would take it for tiktoken's, and ask for tiktoken."""
    file = directory / "tokenizer.model"
    if (directory / "tokenizer.json").exists() or not file.exists():
        return
    try:
        sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{file} is no readable SentencePiece model ({' '.join(str(error).split())[:120]}); fetch it again, or "
            "add the model's tokenizer.json"
        ) from error


def check_same_tokenizer(target: Tokenizer, draft: Tokenizer) -> None:
    """Makes sure that an id means the same token to both models.

    One vocabulary may have more entries at its end when they are padding.

    Raises:
        UserError: showing the first id whose tokens differ.
    """
    target_tokens, draft_tokens = (
        {i: token for token, i in tokenizer.vocabulary().items()} for tokenizer in (target, draft)
    )
    if target_tokens == draft_tokens:
        return
    shared = min(max(target_tokens, default=0), max(draft_tokens, default=0))
    for i in sorted(target_tokens.keys() | draft_tokens.keys()):
        ours, theirs = target_tokens.get(i), draft_tokens.get(i)
        if ours == theirs:
            continue
        extra = ours if theirs is None else theirs
        if i > shared and extra is not None and _PADDING.fullmatch(extra):
            continue
        raise UserError(
            f"target and draft have different tokenizers: id {i} is {ours!r} to the target and {theirs!r} to the draft; "
            "use a draft trained for this target's vocabulary"
        )
