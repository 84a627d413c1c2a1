"""The guard's account, replayed on the host."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from s2d_jax.config.decode import DecodeConfig
from s2d_jax.draft.guard import (
    CREDIT_CAP,
    EARNED_PER_TOKEN,
    FIRST_WAIT,
    LONGEST_WAIT,
    allowance,
    worst_case,
)


class Account:
    """The guard of one row (`s2d_jax.draft.guard`) in plain numbers."""

    def __init__(self, config: DecodeConfig, max_new_tokens: int):
        assert config.costs is not None
        self.costs, self.has_tree = config.costs, config.tree is not None
        self.start = allowance(max_new_tokens, config)
        self.credit, self.plain_run, self.wait = self.start, 0, FIRST_WAIT
        self.worst = worst_case(self.costs.draft_step, self.costs.verify)

    def affordable_length(self) -> int:
        """`guard.affordable_length` of this row."""
        behind = self.plain_run * self.costs.catch_up
        length = bisect.bisect_right(self.worst, 0.5 * self.credit - behind)
        probe = self.plain_run >= self.wait and self.worst[0] <= self.credit - behind
        return max(length, int(probe))

    def settle(self, steps: Sequence[int], num_draft: int, num_emitted: int) -> None:
        """`guard.charge` and `guard.settle` of a round with these draft steps."""
        self.credit += EARNED_PER_TOKEN * num_emitted
        if steps:
            if self.has_tree:  # as `TreeVerifier.charged`
                steps = [max(steps)] * len(steps)
            spent = sum(self.costs.draft_step[exit] for exit in steps)
            spent += self.plain_run * self.costs.catch_up
            saved = num_emitted - self.costs.verify[num_draft] - spent
            self.credit += saved
            if saved > 0:
                self.wait = FIRST_WAIT
            elif self.plain_run >= self.wait:
                self.wait = min(2 * self.wait, LONGEST_WAIT)
        self.credit = min(self.credit, self.start + CREDIT_CAP)
        self.plain_run = 0 if steps else self.plain_run + 1
