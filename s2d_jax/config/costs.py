"""What the parts of a round cost, as measured."""

from __future__ import annotations

import dataclasses

from s2d_jax.config.plain import plain_fields
from s2d_jax.errors import require


@dataclasses.dataclass(frozen=True)
class RoundCosts:
    """What a round costs, in units of one round of plain decoding. Not compiled in.

    `infer.calibrate` measures these; the expected-gain rule and the guard decide by them.

    Attributes:
        draft_step: for each exit in use, the cost of drafting one token that leaves there.
        verify: `verify[g]` is the cost of the rest of a round that drafted g tokens; `verify[0]` is 1.
        catch_up: cost of one position that the draft has not seen, when a row drafts again after plain rounds.
        acceptance: for each exit in use, the probabilities that a token is accepted at confidences 0, 1/(n-1), ..., 1 (linear
            between them); if empty, the confidence itself is that probability.
        next_acceptance: the probability that a token not yet drafted will be accepted, if all before it are.

    Raises:
        UserError: for negative costs or probabilities outside [0, 1].
    """

    draft_step: tuple[float, ...]
    verify: tuple[float, ...]
    catch_up: float = 0.0
    acceptance: tuple[tuple[float, ...], ...] = ()
    next_acceptance: float = 0.5

    def __post_init__(self):
        plain_fields(self)
        require(
            len(self.draft_step) > 0 and min(self.draft_step) >= 0,
            f"draft_step={self.draft_step} must be costs of 0 or more, one per exit; a plain round costs 1",
        )
        require(
            len(self.verify) >= 2 and self.verify[0] == 1.0 and min(self.verify) > 0,
            f"verify={self.verify} must start with 1, the cost of a plain round, and go on with that after 1, 2, ... tokens",
        )
        require(self.catch_up >= 0, f"catch_up={self.catch_up} must be 0 or more")
        require(
            not self.acceptance
            or (
                len(self.acceptance) == len(self.draft_step)
                and len({len(knots) for knots in self.acceptance}) == 1
                and len(self.acceptance[0]) >= 2
            ),
            f"acceptance has {len(self.acceptance)} tables for {len(self.draft_step)} exits; give one of equal length for each",
        )
        probabilities = (*sum(self.acceptance, ()), self.next_acceptance)
        require(
            all(0 <= p <= 1 for p in probabilities),
            f"acceptance={self.acceptance}, next_acceptance={self.next_acceptance} must lie in [0, 1]: probabilities",
        )
