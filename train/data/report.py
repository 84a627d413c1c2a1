"""What happened to the conversations: how many of each source were left out, and why."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from s2d_jax.cli.screen import PlainConsole

# Counts and their names in the table, in its order: those of conversations first, then those of documents and rows.
_WORDS = {
    "conversations": "conversations read",
    "no_conversation": "left out: no list of turns, nor prompt and completion",
    "not_text": "left out: a turn is not text, such as a call of a tool",
    "other_roles": "left out: roles other than user, assistant and system",
    "unclear_finished": "left out: `finished` is no list of true and false",
    "no_answer": "left out: no answer",
    "roles_do_not_alternate": "left out: roles do not alternate",
    "empty_turn": "left out: the first turn or answer is empty",
    "refused_by_template": "left out: refused by the chat template",
    "shortened": "kept without some turns: unprompted, unanswered or empty",
    "documents": "sequences made",
    "truncated": "truncated to data.max_length",
    "truncated_before_any_answer": "left out: truncated before any answer",
    "rows": "packed rows",
    "tokens": "tokens in them",
    "answer_tokens": "of those, answers",
}
_ALWAYS = ("conversations", "documents", "rows", "tokens", "answer_tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceReport:
    """Counts of one source.

    Attributes:
        path: where the source is.
        weight: how often each of its rows is seen per epoch.
        conversations: rows read.
        no_conversation: left out: rows that hold neither a list of turns nor prompt and completion.
        not_text: left out: a turn has no content, or one that is not text.
        other_roles: left out: a turn of another role than user, assistant and system, such as tool.
        unclear_finished: left out: `finished` fits no answers.
        no_answer: left out: no user turn followed by an answer.
        roles_do_not_alternate: left out: two turns of one role in a row, or a system message in the middle.
        empty_turn: left out: nothing but white space in the first question or answer.
        refused_by_template: left out: the chat template refuses it.
        shortened: kept, without turns before the first question, behind the last answer, or from an empty turn on.
        documents: token sequences made; a conversation whose turns the template rewrites makes more than one.
        truncated: documents cut at the length of a row.
        truncated_before_any_answer: truncated documents left out because the cut came before any answer.
        rows: packed rows.
        tokens: tokens in these rows, without padding.
        answer_tokens: tokens that the assistant writes; they enter the loss.
    """

    path: str
    weight: float
    conversations: int = 0
    no_conversation: int = 0
    not_text: int = 0
    other_roles: int = 0
    unclear_finished: int = 0
    no_answer: int = 0
    roles_do_not_alternate: int = 0
    empty_turn: int = 0
    refused_by_template: int = 0
    shortened: int = 0
    documents: int = 0
    truncated: int = 0
    truncated_before_any_answer: int = 0
    rows: int = 0
    tokens: int = 0
    answer_tokens: int = 0

    def counts(self) -> dict[str, int]:
        """All counts by name."""
        return {name: getattr(self, name) for name in _WORDS}


@dataclasses.dataclass(frozen=True)
class DataReport:
    """Counts of every source and of all together, and where the rows came from.

    Attributes:
        sources: one report each, in the order of `data.paths`.
        cache: whether the rows came from the cache or were kept in it, in words.
        refusal: what a chat template said when it refused the first conversation; "" if it refused none.
    """

    sources: tuple[SourceReport, ...]
    cache: str
    refusal: str = ""

    @property
    def total(self) -> dict[str, int]:
        """Each count, added up over the sources."""
        names = self.sources[0].counts()
        return {name: sum(source.counts()[name] for source in self.sources) for name in names}

    def to_json(self) -> dict[str, Any]:
        """What data.json holds."""
        return {**dataclasses.asdict(self), "total": self.total}

    def __str__(self) -> str:
        return self.table()

    def table(self, width: int = 100) -> str:
        """A table of at most `width` columns: what was read, left out (unless 0) and packed of each source."""
        table = Table(title="data", title_justify="left")
        table.add_column("source", overflow="fold", max_width=36 * width // 100)
        table.add_column("what")
        table.add_column("count", justify="right")
        blocks = [(_title(source), source.counts()) for source in self.sources]
        if len(blocks) > 1:
            blocks.append(("all", self.total))
        for title, counts in blocks:
            shown = [name for name in _WORDS if counts[name] or name in _ALWAYS]
            for line, name in enumerate(shown):
                table.add_row("" if line else title, _WORDS[name], f"{counts[name]:,}")
            table.add_section()
        text = io.StringIO()
        PlainConsole(file=text, width=width).print(table)
        notes = [self.cache]
        if self.refusal:
            notes.insert(0, f"the chat template refused a conversation: {self.refusal}")
        return text.getvalue() + "\n".join(notes)


def _title(source: SourceReport) -> str:
    return source.path if source.weight == 1 else f"{source.path} (weight {source.weight:g})"


def source_reports(
    paths: Sequence[str], weights: Sequence[float], counts: Sequence[dict[str, int]]
) -> tuple[SourceReport, ...]:
    """Reports from counts by name, as the cache keeps them."""
    return tuple(
        SourceReport(path=path, weight=weight, **entry)
        for path, weight, entry in zip(paths, weights, counts, strict=True)
    )
