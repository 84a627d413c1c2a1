"""How a model scores given texts: logits at every position, and how likely each token is."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from s2d_jax.errors import UserError, shown
from s2d_jax.model.kv_cache import KVCache, read_window
from s2d_jax.model.transformer import Transformer, apply_model
from s2d_jax.text.prompts import (
    OnePrompt,
    Prompts,
    check_ids,
    is_ids,
    names_of_prompts,
    one_prompt,
    split_prompts,
)
from s2d_jax.text.tokenizer import Tokenizer

_SHORTEST = 32
# Positions whose logits `score` holds at once.
_CHUNK = 256


@dataclasses.dataclass(frozen=True)
class TextScore:
    """How likely a model finds a text.

    Attributes:
        token_ids: the whole text, with the BOS that the tokenizer adds, if any.
        log_probs: f32 `[T - 1]`, natural logarithms, for each token but the first, since nothing comes before that one.
    """

    token_ids: list[int]
    log_probs: np.ndarray

    @property
    def total(self) -> float:
        """The log-probability of the text after its first token; 0 for a single token."""
        return float(self.log_probs.sum(dtype=np.float64))

    @property
    def perplexity(self) -> float:
        """`exp(-total / (T - 1))`; 1 for a text of a single token."""
        with np.errstate(over="ignore"):
            return float(np.exp(-self.total / max(len(self.log_probs), 1)))

    def __repr__(self) -> str:
        return f"TextScore: {len(self.token_ids)} tokens, total {self.total:.2f}, perplexity {self.perplexity:.2f}"


def logits_of(model: Transformer, params: Any, token_ids: Prompts) -> Float[Array, "*B T V"]:
    """f32 logits of one sequence `[T, V]` or of equally long rows `[B, T, V]`; raises as `Model.logits` says."""
    one = one_prompt(token_ids)
    found = split_prompts(token_ids) if one is None else [one]
    rows = [_checked(model, ids) for ids in found]
    if len({len(ids) for ids in rows}) > 1:
        raise UserError(
            f"rows of {min(map(len, rows))} to {max(map(len, rows))} tokens have no logits in one array; "
            "give rows of one length, or one at a time"
        )
    length = len(rows[0])
    tokens_BT = np.zeros((len(rows), _capacity(length)), np.int32)
    tokens_BT[:, :length] = rows
    with jax.enable_x64(False):
        logits_BTV = _logits(model, params, jnp.asarray(tokens_BT))[:, :length]
    return logits_BTV if one is None else logits_BTV[0]


def scores_of(
    model: Transformer, params: Any, tokenizer: Tokenizer | None, texts: Prompts
) -> list[TextScore]:
    """One score per text; raises as `Model.score` says."""
    found = split_prompts(texts)
    rows = [_ids(tokenizer, text) for text in found]
    for ids, name in zip(rows, names_of_prompts(len(rows)), strict=True):
        _check(model, ids, name, tokenizer)
    return [_score(model, params, ids) for ids in rows]


def _ids(tokenizer: Tokenizer | None, text: OnePrompt) -> list[int]:
    if is_ids(text):
        return text
    if not isinstance(text, str):
        raise UserError(
            f"{shown(text)} is a conversation; score its text: model.tokenizer.render_chat(messages)"
        )
    if tokenizer is None:
        raise UserError(
            f"{shown(text)} is text, but the model has no tokenizer; give lists of token ids"
        )
    return tokenizer.encode_text(text)


def _checked(model: Transformer, ids: OnePrompt) -> list[int]:
    """The ids as they are. Raises UserError unless they are token ids of this model."""
    if not is_ids(ids):
        raise UserError(
            f"{shown(ids)} is no list of token ids; encode it: model.tokenizer.encode(text)"
        )
    _check(model, ids, "the prompt")
    return ids


def _check(
    model: Transformer, ids: list[int], name: str, tokenizer: Tokenizer | None = None
) -> None:
    check_ids(ids, model.config.vocab_size, name, tokenizer)
    if len(ids) > model.config.max_context:
        raise UserError(
            f"{name} has {len(ids)} tokens, more than the model's context of {model.config.max_context}; shorten it"
        )


def _score(model: Transformer, params: Any, ids: list[int]) -> TextScore:
    capacity = _capacity(len(ids))
    tokens_BC = np.zeros((1, capacity + 1), np.int32)
    tokens_BC[0, : len(ids)] = ids
    width, length_B = min(capacity, _CHUNK), jnp.asarray([len(ids)], jnp.int32)
    with jax.enable_x64(False):
        log_probs_BC = _log_probs(model, params, jnp.asarray(tokens_BC), length_B, width)
    return TextScore(ids, np.asarray(log_probs_BC[0])[: len(ids) - 1])


def _capacity(length: int) -> int:
    """32, 64, 128, ...: few shapes, so few compilations."""
    return max(_SHORTEST, 1 << (length - 1).bit_length())


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: Transformer, params, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    return apply_model(model, params, "__call__", tokens_BT)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _log_probs(
    model: Transformer,
    params: Any,
    tokens_BC: Int[Array, "B C"],
    length_B: Int[Array, "B"],
    width: int,
) -> Float[Array, "B C"]:
    """f32: at each position the log-probability of the next token, from chunks of `width` positions behind a cache."""
    c, (B, C) = model.config, tokens_BC.shape
    cache = KVCache.create(c.num_layers, B, c.num_kv_heads, C - 1, c.head_dim, dtype=model.dtype)

    def chunk(i, carry):
        cache, found_BC = carry
        start_B = cache.length_B
        h_BWD = apply_model(model, params, "embed", read_window(tokens_BC, start_B, width))
        h_BWD, cache = apply_model(model, params, "run_blocks", h_BWD, cache, 0, c.num_layers)
        logits_BWV = apply_model(model, params, "logits", h_BWD)
        next_BW = read_window(tokens_BC, start_B + 1, width)
        own_BW = jnp.take_along_axis(logits_BWV, next_BW[:, :, None], axis=2)[:, :, 0]
        log_probs_BW = own_BW - jax.nn.logsumexp(logits_BWV, axis=2)
        found_BC = jax.lax.dynamic_update_slice_in_dim(found_BC, log_probs_BW, i * width, 1)
        return cache.advance_to(start_B + width), found_BC

    chunks = -(-jnp.max(length_B) // width)
    carry = cache, jnp.zeros((B, C), jnp.float32)
    return jax.lax.fori_loop(0, chunks, chunk, carry)[1]
