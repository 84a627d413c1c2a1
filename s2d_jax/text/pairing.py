"""Whether two models use the same tokens: the entries of their tokenizers, and what these do with texts."""

from __future__ import annotations

import functools
import hashlib
import json
import re

from s2d_jax.errors import UserError, shown
from s2d_jax.text.tokenizer import Tokenizer

# Names of entries that only pad a vocabulary, as in `[PAD151665]` or `<|reserved_special_token_3|>`; in brackets, because
# `padding` and `extra` are also parts of words.
_PADDING = re.compile(
    r"[<\[]\|?(pad|padding|unused|dummy|reserved|extra|placeholder)([_ -]?(special|token|id))*[_ -]?\d*\|?[>\]]",
    re.IGNORECASE,
)

# Short texts on which the pipelines of tokenizers differ although their entries are equal: how digits, runs of spaces and
# newlines, contractions, scripts, capitals, signs and composed characters are split or normalised. A hash of their ids is kept
# with lists of tokens, so a change here makes all of these be of another tokenizer.
PROBES = (
    *("7", "42", "123", "1234567", "a1b22c333", " 2024-11-22", "3.14159 1,000,000", "٣٤٥ ½ ² ⅷ"),
    *(" ", "  ", "   x", "x   y", "x  ", "\t\tx", " \t x", "a\u00a0b", "a\u2003b\u200bc"),
    *("\n", "\n\n", "\r\n", "x\n\n\ny", " \n \n x", "x;\n\n  y", "!\n", "//\n", "a/\nb"),
    *("I'm they've", "DON'T We'Ll", "x's'", "'tis", "d'été", "rock 'n' roll"),
    *("the quick brown", "The Quick", "HTTPServerError", "snake_case camelCase", "ÜBER Straße"),
    *(
        "中文文本",
        "日本語のテキスト",
        "한국어 문장",
        "中文abc123",
        "हिन्दी में",
        "மொழி",
        "Привет, мир!",
    ),
    *(
        "🤖",
        "👩‍👧‍👦x",
        "🏳️‍🌈 …",
        "café",
        "cafe\u0301",
        "Å\u030a",
        "ﬁﬁ",
        "ＡＢ１２",
        "가\u1100\u1161",
    ),
    *(
        "a.b,c",
        "(x) [y] {z}",
        "...",
        "== != <=",
        "$x^2$ a+b",
        "“q” ‘r’ –",
        "\\n\\t",
        "#!/bin",
        "user@host",
    ),
)


def behaviour_hash(tokenizer: Tokenizer) -> str:
    """A SHA-256 of what the tokenizer makes of `PROBES`: it changes with the pipeline, not with entries that only pad."""
    ids = [tokenizer.encode(text) for text in PROBES]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def check_same_tokenizer(target: Tokenizer, draft: Tokenizer) -> list[str]:
    """Makes sure that an id means the same token to both models, and that a text becomes the same ids.

    One vocabulary may have more entries at its end when they are padding. A special token may have another name where one of
    the names is that of a reserved one.

    Returns:
        A line about each such name, for commands to say.

    Raises:
        UserError: showing the first id whose tokens differ, or a text whose ids do.
    """
    return list(_compared(target, draft))


@functools.lru_cache(maxsize=4)
def _compared(target: Tokenizer, draft: Tokenizer) -> tuple[str, ...]:
    """The notices, remembered: commands ask, and then every decoder of the pair, and each time takes a third of a second."""
    if target is draft:
        return ()
    notices = _check_entries(target, draft)
    _check_texts(target, draft)
    return tuple(notices)


def _check_entries(target: Tokenizer, draft: Tokenizer) -> list[str]:
    target_tokens, draft_tokens = (
        {i: token for token, i in tokenizer.vocabulary().items()} for tokenizer in (target, draft)
    )
    if target_tokens == draft_tokens:
        return []
    notices = []
    shared = min(max(target_tokens, default=0), max(draft_tokens, default=0))
    special = set(target.special_token_ids()) & set(draft.special_token_ids())
    for i in sorted(target_tokens.keys() | draft_tokens.keys()):
        ours, theirs = target_tokens.get(i), draft_tokens.get(i)
        if ours == theirs:
            continue
        extra = ours if theirs is None else theirs
        if i > shared and extra is not None and _PADDING.fullmatch(extra):
            continue
        if (
            i in special
            and ours
            and theirs
            and (_PADDING.fullmatch(ours) or _PADDING.fullmatch(theirs))
        ):
            notices.append(
                f"id {i} is {ours!r} to the target and {theirs!r} to the draft: a renamed special token, taken for the same"
            )
            continue
        raise UserError(
            f"target and draft have different tokenizers: id {i} is {ours!r} to the target and {theirs!r} to the draft; "
            "use a draft trained for this target's vocabulary"
        )
    return notices


def _check_texts(target: Tokenizer, draft: Tokenizer) -> None:
    """Raises UserError for a text that becomes other ids, in its shortest form."""
    for text in sorted((*PROBES, *_with_added_tokens(target, draft)), key=len):
        ours, theirs = target.encode(text), draft.encode(text)
        if ours != theirs:
            raise UserError(
                f"target and draft have different tokenizers: {shown(text)} is {shown(ours)} to the target and "
                f"{shown(theirs)} to the draft, although their entries are the same; use a draft trained with this target's "
                "tokenizer.json (earlier versions read directories by their tokenizer_class: train such a draft again)"
            )


def _with_added_tokens(target: Tokenizer, draft: Tokenizer) -> list[str]:
    """Texts around the special tokens that both know: whether they are recognised, and what they do to the text beside them."""
    ours, theirs = target.vocabulary(), draft.vocabulary()
    ids = {*target.special_token_ids(), *draft.special_token_ids()}
    shared = [token for token, i in ours.items() if i in ids and theirs.get(token) == i]
    return [text for token in sorted(shared) for text in (f"a{token}b", f"a {token} b")]
