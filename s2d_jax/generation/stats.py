"""What a generation reports about itself."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, repr=False)
class GenerationStats:
    """Counts of one row, or summed over rows. Rates leave out prefill: its target pass and the token that it emits.

    Attributes:
        prompt_tokens: tokens of the prompt.
        emitted_tokens: new tokens, prefill's included.
        target_forwards: target passes after prefill.
        plain_rounds: target passes for which there was a draft, but it drafted nothing.
        draft_forwards: runs of each of the draft's segments for the whole batch, `{exit layer: runs}`.
        drafted_tokens: tokens proposed.
        accepted_tokens: tokens proposed, accepted and emitted (also those that a stop string then cut off).
        drafted_per_depth: rounds that drafted at least 1, 2, ... tokens.
        accepted_per_depth: rounds that accepted at least 1, 2, ... tokens.
        exit_histogram: drafted tokens by the exit that drafted them; they add up to `drafted_tokens`.
        draft_steps: positions that drafting took through the draft, by the exit they left at. A step of a chain proposes a
            token or ends the chain; one of a tree expands a node, whose children are proposed together.
        seconds: wall time of the call by phase: `compile`, `total` (without compile), and when asked for `prefill` and
            `decode`, or `prefill`, `draft`, `verify` and `rest`; these add up to `total`.
        rows: how many rows are counted.
        prefilled_tokens: tokens of the prompt that were computed; the others were in the caches already.
        overshoot_tokens: tokens that were decoded behind a stop string and dropped; not among the emitted ones.
    """

    prompt_tokens: int
    emitted_tokens: int
    target_forwards: int
    plain_rounds: int
    draft_forwards: dict[int, int]
    drafted_tokens: int
    accepted_tokens: int
    drafted_per_depth: tuple[int, ...]
    accepted_per_depth: tuple[int, ...]
    exit_histogram: dict[int, int]
    draft_steps: dict[int, int]
    seconds: dict[str, float]
    rows: int = 1
    prefilled_tokens: int = 0
    overshoot_tokens: int = 0

    @property
    def mean_acceptance_length(self) -> float:
        """MAT: tokens emitted per target pass, the bonus or correction token included; autoregressive is 1."""
        decoded = self.emitted_tokens + self.overshoot_tokens - self.rows
        return decoded / max(self.target_forwards, 1)

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of the whole call, prefill included and compilation left out; 0 when nothing was timed."""
        seconds = self.seconds.get("total", 0.0)
        return self.emitted_tokens / seconds if seconds else 0.0

    @property
    def summary(self) -> str:
        """Rows, tokens, MAT and speed, in a few words."""
        rows = "" if self.rows == 1 else f"{self.rows} rows, "
        speed = f"MAT {self.mean_acceptance_length:.2f}, {self.tokens_per_second:.1f} tokens/s"
        return f"{rows}{self.emitted_tokens} tokens, {speed}"

    def __repr__(self) -> str:
        drafted = f"{self.accepted_tokens} of {self.drafted_tokens} drafted tokens accepted"
        exits = ", ".join(f"{exit}: {count}" for exit, count in self.exit_histogram.items())
        heading = f"GenerationStats: {self.summary}, {self.target_forwards} rounds"
        return f"{heading}\n    {drafted}{f', drafted at exit {exits}' if exits else ''}"

    @property
    def draft_acceptance_rate(self) -> float:
        """Accepted over drafted tokens; 0 when nothing was drafted."""
        return self.accepted_tokens / max(self.drafted_tokens, 1)

    @property
    def acceptance_per_depth(self) -> tuple[float, ...]:
        """Among rounds that drafted a token at this depth, the share that accepted it."""
        pairs = zip(self.accepted_per_depth, self.drafted_per_depth, strict=True)
        return tuple(accepted / max(drafted, 1) for accepted, drafted in pairs)

    @property
    def mean_draft_length(self) -> float:
        """Drafted tokens per target pass."""
        return self.drafted_tokens / max(self.target_forwards, 1)

    @property
    def draft_length_histogram(self) -> dict[int, int]:
        """Rounds by the number of tokens that they drafted, 0 included."""
        at_least = (self.target_forwards, *self.drafted_per_depth, 0)
        exactly = {n: a - b for n, (a, b) in enumerate(itertools.pairwise(at_least))}
        return {n: rounds for n, rounds in exactly.items() if rounds}


def sum_stats(rows: Sequence[GenerationStats]) -> GenerationStats:
    """Adds up rows of one call, which share draft runs and seconds; or several calls, whose runs and seconds add up.

    Rows of one call carry the same `draft_forwards` and `seconds` objects, which are then counted once.
    """
    calls = list({id(row.seconds): row for row in rows}.values())

    def total(name):
        return sum(getattr(row, name) for row in rows)

    def columns(name):
        return tuple(
            sum(column) for column in zip(*(getattr(row, name) for row in rows), strict=True)
        )

    return GenerationStats(
        **{name: total(name) for name in _SUMMED},
        drafted_per_depth=columns("drafted_per_depth"),
        accepted_per_depth=columns("accepted_per_depth"),
        exit_histogram=_add_dicts([row.exit_histogram for row in rows]),
        draft_steps=_add_dicts([row.draft_steps for row in rows]),
        draft_forwards=_add_dicts([call.draft_forwards for call in calls]),
        seconds=_add_dicts([call.seconds for call in calls]),
    )


_SUMMED = (
    "prompt_tokens", "emitted_tokens", "target_forwards", "plain_rounds",
    "drafted_tokens", "accepted_tokens", "rows", "prefilled_tokens", "overshoot_tokens",
)  # fmt: skip


def _add_dicts(dicts: Sequence[dict]) -> dict:
    keys = dict.fromkeys(key for entry in dicts for key in entry)
    return {key: sum(entry.get(key, 0) for entry in dicts) for key in keys}
