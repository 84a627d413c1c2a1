"""`Model` and `Draft`: a config, parameters and a tokenizer, as loaded."""

from __future__ import annotations

import dataclasses
from typing import Any

from s2d_jax.config.draft import DraftConfig
from s2d_jax.config.model import ModelConfig
from s2d_jax.formats.names import FINAL_NORM, get_weight
from s2d_jax.model.params import Params
from s2d_jax.model.transformer import Transformer
from s2d_jax.text.tokenizer import Tokenizer
from s2d_jax.weights.vocabulary import DraftVocabulary, trimmed_params


@dataclasses.dataclass(frozen=True)
class Model:
    """A transformer that can decode.

    Attributes:
        config: its shape.
        params: nested dict of arrays; matrices are `[out, in]`, or `Int8Weight`s of that shape.
        tokenizer: None for a directory without one.
        source: where it came from, for messages and reports.
    """

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer | None
    source: str

    @property
    def dtype(self) -> Any:
        """Of activations and caches: that of the norms and biases, whatever the format of the matrices."""
        return get_weight(self.params, FINAL_NORM).dtype

    @property
    def transformer(self) -> Transformer:
        """The module that `params` belong to, with its whole head."""
        return Transformer(self.config, self.dtype)


@dataclasses.dataclass(frozen=True)
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
        """The same with what drafting reads: the parts of single exits, and heads over the listed tokens if there is a list."""
        size = None if self.vocabulary is None else self.vocabulary.size
        return Transformer(self.config, self.dtype, size, self.draft_config.parts)


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
