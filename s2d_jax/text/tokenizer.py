"""Text to tokens and back, and conversations through the chat template."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from s2d_jax.errors import UserError, shown
from s2d_jax.formats.eos_ids import merged_ids, saved_eos_token_ids
from s2d_jax.formats.gguf import GGUFFile
from s2d_jax.formats.gguf_tokenizer import tokenizer_from_gguf
from s2d_jax.progress.activity import activity
from s2d_jax.progress.state import Activity
from s2d_jax.text.templates import (
    DEFAULT,
    VICUNA_TEMPLATE,
    chosen_template,
    default_template,
    named_templates,
    templates_in_gguf,
)
from s2d_jax.text.tokenizer_files import find_tokenizer

# transformers advises to install PyTorch when it is imported; nothing here needs it. Importing it takes seconds, so it is
# imported when a tokenizer is made.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

# Special tokens that end an answer in the supported families, beside the tokenizer's own EOS.
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>")

# Tokens of a single byte in vocabularies with byte fallback.
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class Tokenizer:
    """A Hugging Face fast tokenizer with a chat template and the tokens that end an answer.

    Args:
        fast: a tokenizer of transformers.
        stop_token_ids: ids that end an answer, beside its EOS and the usual end-of-turn tokens.
        templates: chat templates by name; None takes those of `fast`.

    Attributes:
        templates: the chat templates that came with the tokenizer, by name.
        chat_template: the Jinja template in use: the default one of `templates`, else Vicuna's.
        stop_token_ids: all ids that end an answer.
        rebuilt_as: the class as which earlier versions of this library rebuilt the tokenizer, and may have made other ids; None
            where they took it as it stands, too.
    """

    def __init__(
        self,
        fast: Any,
        stop_token_ids: Sequence[int] = (),
        templates: Mapping[str, str] | None = None,
    ):
        self._fast = fast
        if templates is None:
            templates = named_templates(fast.chat_template, "the tokenizer")
        self.templates = dict(templates)
        self.chat_template = default_template(self.templates)
        self._is_chosen = False
        self.rebuilt_as: str | None = None
        special = {str(t): i for i, t in fast.added_tokens_decoder.items() if t.special}
        end_of_turn = [special[token] for token in END_OF_TURN if token in special]
        self.stop_token_ids = merged_ids(fast.eos_token_id, stop_token_ids, end_of_turn)

    def __repr__(self) -> str:
        ends = shown(self._fast.convert_ids_to_tokens(list(self.stop_token_ids)), 40)
        template = "Vicuna's" if self.chat_template == VICUNA_TEMPLATE else "its own"
        return f"Tokenizer: {len(self._fast)} tokens, answers end with {ends}, chat template {template}"

    @classmethod
    def from_directory(cls, directory: str | Path) -> Tokenizer:
        """Reads the tokenizer of a Hugging Face directory, or what `save` wrote: tokenizer.json as it stands, if there is one.

        Raises:
            UserError: if there is none that can be read.
        """
        directory = Path(directory)
        with _reading():
            found = find_tokenizer(directory)
        tokenizer = cls(found.fast, saved_eos_token_ids(directory), found.templates)
        tokenizer.rebuilt_as = found.rebuilt_as
        return tokenizer

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> Tokenizer:
        """Builds the tokenizer that a GGUF file describes; torch is not needed.

        Raises:
            UserError: for an unsupported kind of tokenizer.
        """
        with _reading():
            from transformers import PreTrainedTokenizerFast

            found = tokenizer_from_gguf(file)
            fast = PreTrainedTokenizerFast(
                tokenizer_object=found.backend,
                clean_up_tokenization_spaces=False,
                **found.special_tokens,
            )
        return cls(fast, found.stop_token_ids, templates_in_gguf(file.metadata, file.path))

    def with_chat_template(self, choice: str | None) -> Tokenizer:
        """The tokenizer with another chat template in use; None gives it as it is.

        Args:
            choice: the name of one of `templates`, `vicuna`, or a file that holds a Jinja template.

        Raises:
            UserError: if it is none of these.
        """
        if choice is None:
            return self
        chosen = copy.copy(self)
        chosen.chat_template = chosen_template(self.templates, choice)
        chosen._is_chosen = True
        return chosen

    @property
    def template_notice(self) -> str | None:
        """The line that a command says, once, where Vicuna's template stands in for one that the model lacks."""
        if self.templates or self._is_chosen or self.chat_template != VICUNA_TEMPLATE:
            return None
        return (
            "the model has no chat template, so conversations are written as Vicuna's; --chat-template NAME_OR_FILE "
            "(--data.chat-template in training) chooses another"
        )

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`; special tokens written in it are recognised."""
        return self._fast.encode(text, add_special_tokens=add_special_tokens, verbose=False)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text with nothing before it: what the tokenizer puts before every text (BOS), and then the text.

        A text that begins with it already gets no second one. Nothing is put behind the text.
        """
        ids, before = self.encode(text), self._put_before
        return ids if ids[: len(before)] == before else [*before, *ids]

    @functools.cached_property
    def _put_before(self) -> list[int]:
        """The special tokens that the tokenizer puts before every text."""
        bare, whole = self.encode("a"), self.encode("a", add_special_tokens=True)
        starts = (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        return whole[: next(starts, 0)]

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
        except (
            Exception
        ) as error:  # a template comes with a model, and may do anything that its sandbox allows
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(
                f"the chat template refuses the conversation ({reason}); give messages with role and content"
            ) from error

    def encode_chat(
        self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of `render_chat`; the template itself writes BOS where the model wants it."""
        return self.encode(self.render_chat(messages, add_generation_prompt))

    def vocabulary(self) -> dict[str, int]:
        """Every token's string -> its id."""
        return self._fast.get_vocab()

    def token(self, token_id: int) -> str | None:
        """The string of a token; None for an id that the tokenizer does not have."""
        if not 0 <= token_id < 2**32:  # what the Rust library takes
            return None
        return self._fast.backend_tokenizer.id_to_token(token_id)

    def special_token_ids(self) -> tuple[int, ...]:
        """Ascending ids of all tokens that plain text never becomes: control tokens, tags, and those that end an answer."""
        return tuple(sorted({*self._fast.added_tokens_decoder, *self.stop_token_ids}))

    def save(self, directory: str | Path) -> None:
        """Writes what `from_directory` reads.

        That is tokenizer.json, tokenizer_config.json with the chat templates, and generation_config.json with the stop tokens.

        Raises:
            OSError: if the disk is full or not writable.
        """
        directory = Path(directory)
        try:
            self._fast.save_pretrained(str(directory), save_jinja_files=False)
        except Exception as error:
            # The Rust library raises a bare Exception; the system's error number is only in its text.
            found = re.search(r"\(os error (\d+)\)", str(error))
            if isinstance(error, OSError) or found is None:
                raise
            number = int(found[1])
            raise OSError(number, os.strerror(number), str(directory)) from error
        file = directory / "tokenizer_config.json"
        saved = json.loads(file.read_text(encoding="utf-8"))
        # Readable by transformers 4 and 5 alike, and both then take tokenizer.json as it stands.
        saved["tokenizer_class"] = "PreTrainedTokenizerFast"
        saved.pop("auto_map", None)  # names Python files that are not written
        saved.pop("chat_template", None)
        saved |= self._templates_to_save()
        file.write_text(json.dumps(saved, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        generation = {"eos_token_id": list(self.stop_token_ids)}
        (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")

    def _templates_to_save(self) -> dict[str, Any]:
        """The field `chat_template`: every template of the model, and the one in use as the default; none where it had none."""
        templates = dict(self.templates)
        if self._is_chosen or self.chat_template != default_template(templates):
            if DEFAULT in templates and templates[DEFAULT] != self.chat_template:
                templates["replaced_default"] = templates[DEFAULT]
            templates[DEFAULT] = self.chat_template
        if not templates:
            return {}
        if list(templates) == [DEFAULT]:
            return {"chat_template": templates[DEFAULT]}
        named = [{"name": name, "template": text} for name, text in templates.items()]
        return {"chat_template": named}


def _reading() -> contextlib.AbstractContextManager[Activity]:
    """Shows that a tokenizer is read; the first in a process takes longest, because it imports transformers."""
    key = "" if "transformers.tokenization_utils_base" in sys.modules else "tokenizer"
    return activity("reading the tokenizer", key=key)
