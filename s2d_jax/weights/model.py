"""`Model` and `Draft`: a config, parameters and a tokenizer, as loaded."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from s2d_jax.config.draft import DraftConfig
from s2d_jax.config.model import ModelConfig
from s2d_jax.formats.names import FINAL_NORM, get_weight
from s2d_jax.model.params import Params
from s2d_jax.model.transformer import Transformer
from s2d_jax.text.prompts import Prompts
from s2d_jax.text.tokenizer import Tokenizer
from s2d_jax.weights.describe import described_shape, described_size, short_source
from s2d_jax.weights.score import TextScore, logits_of, scores_of
from s2d_jax.weights.vocabulary import DraftVocabulary, trimmed_params


@dataclasses.dataclass(frozen=True, repr=False)
class Model:
    """A transformer that can decode.

    Attributes:
        config: its shape.
        params: nested dict of arrays, JAX's or NumPy's; matrices are `[out, in]`, or `Int8Weight`s of that shape.
        tokenizer: None for a directory without one.
        source: where it came from, for messages and reports.
        notices: lines that a user should see about what was read; commands print them.
    """

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer | None
    source: str
    notices: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)

    @property
    def dtype(self) -> Any:
        """The dtype of activations and caches: that of the norms and biases, whatever the format of the matrices.

        At most 32 bits, also where a program has switched JAX to 64.
        """
        with jax.enable_x64(False):
            return jax.dtypes.canonicalize_dtype(get_weight(self.params, FINAL_NORM).dtype)

    @functools.cached_property
    def device_params(self) -> Params:
        """`params` for computing: NumPy arrays are put on the default device, once; anything else stays as it is."""
        if not any(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(self.params)):
            return self.params
        return jax.tree.map(
            lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, self.params
        )

    @property
    def transformer(self) -> Transformer:
        """The module that `params` belong to, with its whole head."""
        return Transformer(self.config, self.dtype)

    def logits(self, token_ids: Prompts) -> Float[Array, "*B T V"]:
        """f32 logits after every token, of the whole head: before the softmax, without temperature or filters.

        Compiled once for each number of rows and each length 32, 64, 128, ... that holds them.

        Args:
            token_ids: one sequence, or rows of one length: lists, or an array `[T]` or `[B, T]` of integers.

        Returns:
            `[T, V]` for one sequence, `[B, T, V]` for rows.

        Raises:
            UserError: for values that are not token ids, no ids, ids outside the vocabulary, more than the context holds, or
                rows of different lengths.
        """
        return logits_of(self.transformer, self.device_params, token_ids)

    def score(self, texts: Prompts) -> list[TextScore]:
        """How likely each text is: the log-probability of every token after those before it.

        The first token has none, since nothing comes before it, and is left out. Where the tokenizer puts a BOS before
        texts, a text (not token ids) begins with one, as in `generate`, and all of it is scored.
        Logits of at most 256 positions are held at once.

        Args:
            texts: one text or the token ids of one, or a list of these.

        Raises:
            UserError: for conversations and other values that are not texts, text without a tokenizer, no tokens, ids outside
                the vocabulary, or more tokens than the context holds.
        """
        return scores_of(self.transformer, self.device_params, self.tokenizer, texts)

    def __repr__(self) -> str:
        tokens = "" if self.tokenizer else ", no tokenizer"
        heading = f"{type(self).__name__}: {short_source(self.source)}{tokens}"
        return f"{heading}\n    {described_shape(self.config)}, {described_size(self.params)}"


@dataclasses.dataclass(frozen=True, repr=False)
class Draft(Model):
    """A model whose states may be read at several depths, through its one norm and head or through parts of single exits.

    Attributes:
        draft_config: its exits; `params` hold the parts that it names.
        vocabulary: the tokens that its head is read over; None for all. Set it with `with_trimmed_head`.
    """

    draft_config: DraftConfig
    vocabulary: DraftVocabulary | None = None

    @property
    def drafting_transformer(self) -> Transformer:
        """`transformer` with what drafting reads: the parts of single exits, and heads over the listed tokens only, if any."""
        size = None if self.vocabulary is None else self.vocabulary.size
        return Transformer(self.config, self.dtype, size, self.draft_config.parts)

    def __repr__(self) -> str:
        exits = ", ".join(map(str, self.draft_config.exit_layers))
        trimmed = "" if self.vocabulary is None else f", head over {self.vocabulary.size} tokens"
        heading, shape = super().__repr__().split("\n")
        return f"{heading}, exits {exits}{trimmed}\n{shape}"


def with_trimmed_head(draft: Draft, vocabulary: DraftVocabulary | None) -> Draft:
    """The draft with its heads read over the listed tokens only, at every exit; None reads them over all.

    The rows are gathered once and kept beside the whole tables, so an export is whole.

    Raises:
        UserError: for ids that the draft lacks, or a list made for another tokenizer.
    """
    if vocabulary is not None:
        vocabulary.check(draft.config.vocab_size, draft.tokenizer)
    params = trimmed_params(draft.config, draft.params, vocabulary)
    return dataclasses.replace(draft, params=params, vocabulary=vocabulary)
