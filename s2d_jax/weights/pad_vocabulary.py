"""A draft with rows behind its vocabulary, so that programs which compare sizes take it for a target with a longer one."""

from __future__ import annotations

import dataclasses
import re

import jax.numpy as jnp

from s2d_jax.errors import UserError
from s2d_jax.formats.names import EMBEDDING, EXIT_HEADS, LM_HEAD
from s2d_jax.model.params import Params
from s2d_jax.text.tokenizer import Tokenizer
from s2d_jax.weights.model import Draft

# How tokenizers name entries that stand for nothing.
_RESERVED = re.compile(r"[<\[].*(pad|unused|reserved|dummy|placeholder).*[>\]]", re.IGNORECASE)


def pad_vocabulary(draft: Draft, size: int) -> Draft:
    """The draft with `size` entries in its embedding, its head, and every head of an exit.

    The new rows are copies of the row of a token that no text has: zeros would make a logit of 0, which may exceed those of all
    tokens.

    Args:
        draft: f32, f16 or bf16 parameters.
        size: at least its vocabulary, at most twice that.

    Raises:
        UserError: for another size, or if the tokenizer shows no token that is unused.
    """
    known = draft.config.vocab_size
    if not known <= size <= 2 * known:
        raise UserError(
            f"a vocabulary of {known} cannot be padded to {size}; give the vocabulary of the target, {known} to {2 * known}"
        )
    if size == known:
        return draft
    row = unused_token(draft.tokenizer, known, draft.source)
    params = _padded(draft.params, row, size - known)
    config = dataclasses.replace(draft.config, vocab_size=size)
    return dataclasses.replace(draft, config=config, params=params)


def unused_token(tokenizer: Tokenizer | None, vocab_size: int, source: str) -> int:
    """The id of a token that no text has: one without a name, a reserved one, else a special one that ends no text.

    Raises:
        UserError: if there is none.
    """
    if tokenizer is not None:
        named = {i: token for token, i in tokenizer.vocabulary().items()}
        ends = tokenizer.stop_token_ids
        special = [i for i in tokenizer.special_token_ids() if i < vocab_size and i not in ends]
        for unused in (
            [i for i in range(vocab_size) if i not in named],
            [i for i in special if _RESERVED.fullmatch(named.get(i, ""))],
            special,
        ):
            if unused:
                return unused[-1]
    raise UserError(
        f"{source} has no token that is known to be unused, whose row could be copied; pad it where its tokenizer is known"
    )


def _padded(params: Params, row: int, count: int) -> Params:
    """`params` with `count` copies of row `row` behind every table that has a row for each token."""
    tables = {EMBEDDING.ours[0]: EMBEDDING.ours[1], LM_HEAD.ours[0]: LM_HEAD.ours[1]}
    padded = dict(params)
    for name, values in params.items():
        leaf = "kernel" if name.startswith(EXIT_HEADS) else tables.get(name)
        if leaf is not None:
            table_VD = jnp.asarray(values[leaf])
            more_VD = jnp.broadcast_to(table_VD[row], (count, table_VD.shape[1]))
            padded[name] = {**values, leaf: jnp.concatenate([table_VD, more_VD])}
    return padded
