"""One call from its prompts to its result: a generation whose tokens can be read while it runs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Generator, Iterator
from contextlib import nullcontext

from s2d_jax.errors import UserError, shown
from s2d_jax.generation.plan import UNLIMITED, Plan
from s2d_jax.generation.result import FinishReason, GeneratedRow, GenerationResult
from s2d_jax.generation.session import Look, Session
from s2d_jax.generation.stats import GenerationStats, sum_stats
from s2d_jax.progress.activity import text_is_written
from s2d_jax.text.detokenizer import RowText

# The host looks for stop strings after this many rounds.
_ROUNDS_BETWEEN_LOOKS = 8


@dataclasses.dataclass(frozen=True)
class Delta:
    """What is new in one row.

    Attributes:
        row: its number.
        text: new text, of whole characters; may be empty although there are new tokens.
        token_ids: new tokens.
        done: the row has ended.
    """

    row: int
    text: str
    token_ids: tuple[int, ...]
    done: bool


@dataclasses.dataclass(frozen=True)
class Timing:
    """What is timed beside the whole call.

    Attributes:
        prefill: wait after prefill; seconds `prefill` and `decode`.
        rounds: run the parts of each round one by one; seconds `prefill`, `draft`, `verify`, `rest`.
    """

    prefill: bool = False
    rounds: bool = False


class Stream(Iterator[Delta]):
    """The tokens of a running generation. Iterate over it; `close` it, or leave its `with` block, to stop decoding.

    Args:
        session: where it runs; tokens of the prompts that its caches hold are not computed again.
        plan: what is asked for.
        rounds_per_look: rounds between two looks, at first fewer; None looks only at the end, and for stop strings.
        timing: what is timed.
        keep: leave the caches in the session at the end.

    Raises:
        UserError: if `rounds_per_look` is less than 1.
    """

    def __init__(
        self,
        session: Session,
        plan: Plan,
        *,
        rounds_per_look: int | None = None,
        timing: Timing = Timing(),
        keep: bool = False,
    ):
        if rounds_per_look is not None and rounds_per_look < 1:
            raise UserError(f"rounds_per_look={rounds_per_look} must be at least 1")
        self._session, self._plan, self._keep = session, plan, keep
        self._texts = [RowText(plan.tokenizer, row.stop) for row in plan.rows]
        self._done = [False] * len(plan.rows)
        self._seen = [len(ids) for ids in plan.prompts]
        self._look: Look | None = None
        self._result: GenerationResult | None = None
        self._deltas = self._run(rounds_per_look, timing)

    def __next__(self) -> Delta:
        return next(self._deltas)

    def close(self) -> None:
        """Stops decoding. What was generated so far stays in `result`."""
        self._deltas.close()
        self._end()

    def __repr__(self) -> str:
        tokens = sum(len(text.token_ids) for text in self._texts)
        running = "running" if self._result is None else "ended"
        heading = f"Stream: {running}, {len(self._texts)} rows, {tokens} tokens so far"
        return f"{heading}\n    {shown(self._texts[0].text, 90)}"

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def started(self) -> bool:
        """Whether there is a first token."""
        return self._look is not None

    @property
    def result(self) -> GenerationResult:
        """All that was generated, once the iteration has ended or the stream was closed.

        Raises:
            UserError: if the stream still runs, or was closed before its first token.
        """
        if self._result is None:
            raise UserError("the stream has no result yet; iterate to its end, or call finish()")
        return self._result

    def finish(self) -> GenerationResult:
        """Runs to the end, and returns the result."""
        for _ in self:
            pass
        return self.result

    def _run(self, rounds_per_look: int | None, timing: Timing) -> Generator[Delta, None, None]:
        try:
            self._session.begin(self._plan, wait=timing.prefill or timing.rounds)
            if rounds_per_look is not None:
                rounds = _growing_rounds(rounds_per_look)
                yield from self._read(self._session.look())
            elif any(row.stop for row in self._plan.rows):
                rounds = itertools.repeat(_ROUNDS_BETWEEN_LOOKS)
            else:
                rounds = itertools.repeat(UNLIMITED)
            given_out = nullcontext if rounds_per_look is None else text_is_written
            while not all(self._done):
                with given_out():
                    look = self._session.advance(
                        next(rounds), phases=timing.rounds, wait=timing.prefill
                    )
                yield from self._read(look)
        finally:
            self._end()

    def _read(self, look: Look) -> list[Delta]:
        """What is new since the last look. The device is told which rows a stop string ended."""
        self._look, deltas = look, []
        for row, text in enumerate(self._texts):
            length, ended = int(look.state.length_B[row]), bool(look.state.done_B[row])
            was_done, start = self._done[row], self._seen[row]
            new_ids = look.state.tokens_BC[row, start:length].tolist()
            self._seen[row] = length
            new_text, kept_ids = text.feed(new_ids, ended)
            self._done[row] = ended or text.stopped
            if not was_done and (kept_ids or self._done[row]):
                deltas.append(Delta(row, new_text, tuple(kept_ids), self._done[row]))
        if not all(self._done) and any(text.stopped for text in self._texts):
            self._session.end_rows(self._done)
        return deltas

    def _end(self) -> None:
        if self._result is None and self._look is not None:
            self._result = self._made_result()
        if not self._keep:
            self._session.release()

    def _made_result(self) -> GenerationResult:
        rows = [self._made_row(row) for row in range(len(self._texts))]
        return GenerationResult(rows, sum_stats([row.stats for row in rows]))

    def _made_row(self, row: int) -> GeneratedRow:
        assert self._look is not None
        text, start = self._texts[row], len(self._plan.prompts[row])
        origins = self._look.state.origin_BC[row, start : start + len(text.token_ids)]
        return GeneratedRow(
            text=text.text,
            token_ids=text.token_ids,
            finish_reason=self._finish_reason(row),
            stats=self._row_stats(row),
            drafted_by=[(None, *self._plan.exits)[origin] for origin in origins],
            tokenizer=self._plan.tokenizer,
        )

    def _finish_reason(self, row: int) -> FinishReason:
        text = self._texts[row]
        if text.stopped or text.token_ids[-1] in self._plan.stop_ids[row]:
            return "stop"
        return "length" if self._done[row] else "abort"

    def _row_stats(self, row: int) -> GenerationStats:
        assert self._look is not None
        state, counters, exits = self._look.state, self._look.counters, self._plan.exits
        proposed_E = state.proposed_BE[row]
        steps = counters["exit_counts"][row] if exits else ()
        text = self._texts[row]
        return GenerationStats(
            prompt_tokens=len(self._plan.prompts[row]),
            emitted_tokens=len(text.token_ids),
            target_forwards=int(state.rounds_B[row]),
            plain_rounds=int(state.guard.plain_rounds_B[row]) if exits else 0,
            draft_forwards=self._draft_forwards,
            drafted_tokens=int(proposed_E.sum()),
            accepted_tokens=int(state.accepted_BG[row].sum()),
            drafted_per_depth=tuple(state.drafted_BG[row].tolist()),
            accepted_per_depth=tuple(state.accepted_BG[row].tolist()),
            exit_histogram={e: int(n) for e, n in zip(exits, proposed_E, strict=True)},
            draft_steps={e: int(n) for e, n in zip(exits, steps, strict=True)},
            seconds=self._session.seconds,
            prefilled_tokens=self._session.prefilled[row],
            overshoot_tokens=text.overshoot,
        )

    @property
    def _draft_forwards(self) -> dict[int, int]:
        assert self._look is not None
        exits = self._plan.exits
        if not exits:
            return {}
        # Where a mesh splits the rows, each group runs the draft for itself.
        passes = self._look.counters["segment_passes"].reshape(-1, len(exits)).sum(axis=0)
        return {exit: int(n) for exit, n in zip(exits, passes, strict=True)}


def _growing_rounds(most: int) -> Iterator[int]:
    """1, 2, 4, ..., `most`, `most`, ...: the first words come soon, later the host looks less often."""
    rounds = 1
    while True:
        yield min(rounds, most)
        rounds *= 2
