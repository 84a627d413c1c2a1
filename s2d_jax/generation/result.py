"""What one call generated, row by row: texts, tokens, why each row ended, and who chose each token."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator
from typing import Literal, TypeAlias, overload

from s2d_jax.errors import UserError, shown
from s2d_jax.generation.html import html_of
from s2d_jax.generation.stats import GenerationStats
from s2d_jax.text.detokenizer import text_pieces
from s2d_jax.text.tokenizer import Tokenizer

FinishReason: TypeAlias = Literal["stop", "length", "abort"]


@dataclasses.dataclass(frozen=True, repr=False)
class GeneratedRow:
    """What was generated for one prompt.

    Attributes:
        text: new text, special tokens left out; empty without a tokenizer.
        token_ids: new tokens, the stop token included.
        finish_reason: "stop": an end-of-sequence or stop token, or a stop string, ended the row; "length": `max_new_tokens` or
            the end of the context did; "abort": the stream was closed before.
        stats: the counts of this row. The seconds are those of the whole call.
        drafted_by: for each token the exit (its layer) that drafted it; None where the target chose it itself.
        tokenizer: the target's, or None.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stats: GenerationStats
    drafted_by: list[int | None]
    tokenizer: Tokenizer | None = dataclasses.field(default=None, compare=False)

    @functools.cached_property
    def pieces(self) -> list[str]:
        """The text that each token brought; together they are `text`. A character of several tokens comes with the last one."""
        return self.first_pieces(len(self.token_ids))

    def first_pieces(self, count: int) -> list[str]:
        """The first `count` of `pieces`, without computing the others."""
        complete = self.finish_reason != "abort"
        return text_pieces(self.tokenizer, self.token_ids, self.text, count, complete=complete)

    def __repr__(self) -> str:
        heading = f"GeneratedRow: {self.stats.summary}, finished by {self.finish_reason}"
        return f"{heading}\n    {shown(self.text, 90)}"

    def _repr_html_(self) -> str:
        return html_of([self])


@dataclasses.dataclass(frozen=True, repr=False)
class GenerationResult:
    """What one call generated; iterating, indexing and `len` go over its rows.

    Attributes:
        rows: one for each prompt, in the order of the prompts.
        stats: summed over the rows.
    """

    rows: list[GeneratedRow]
    stats: GenerationStats

    @property
    def text(self) -> str:
        """The text of the only row.

        Raises:
            UserError: if there are several.
        """
        if len(self.rows) != 1:
            raise UserError(f"the result has {len(self.rows)} rows; take one: result[0].text")
        return self.rows[0].text

    @property
    def texts(self) -> list[str]:
        """New text per row, special tokens left out; empty strings without a tokenizer."""
        return [row.text for row in self.rows]

    @property
    def token_ids(self) -> list[list[int]]:
        """New tokens per row, the stop token included."""
        return [row.token_ids for row in self.rows]

    @property
    def finish_reasons(self) -> list[FinishReason]:
        """Why each row ended; see `GeneratedRow`."""
        return [row.finish_reason for row in self.rows]

    @property
    def row_stats(self) -> list[GenerationStats]:
        """One per row."""
        return [row.stats for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[GeneratedRow]:
        return iter(self.rows)

    @overload
    def __getitem__(self, index: int) -> GeneratedRow: ...

    @overload
    def __getitem__(self, index: slice) -> list[GeneratedRow]: ...

    def __getitem__(self, index):
        return self.rows[index]

    def __repr__(self) -> str:
        counts = Counter(self.finish_reasons)
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()))
        heading = f"GenerationResult: {self.stats.summary}, finished by {reasons}"
        return f"{heading}\n    {shown(self.rows[0].text, 90)}"

    def _repr_html_(self) -> str:
        return html_of(self.rows)
