"""What makes a model a sorted draft: its exits, their thresholds, and the parts that belong to single exits."""

from __future__ import annotations

import dataclasses

from s2d_jax.config.plain import plain_fields
from s2d_jax.errors import UserError as UserError
from s2d_jax.errors import require


@dataclasses.dataclass(frozen=True)
class ExitParts:
    """The parts that belong to single exits, beside the shared norm and head. An exit is named by its layer count.

    Attributes:
        heads: exits that are read through a head of their own.
        adapters: exits whose state passes a residual low-rank adapter before the shared norm.
        adapter_rank: the rank of every adapter; 0 without adapters.
    """

    heads: tuple[int, ...] = ()
    adapters: tuple[int, ...] = ()
    adapter_rank: int = 0

    def __post_init__(self):
        plain_fields(self)
        for name, exits in (("heads", self.heads), ("adapters", self.adapters)):
            require(
                list(exits) == sorted(set(exits)) and min(exits, default=1) >= 1,
                f"{name}={exits} of the exit parts must be ascending positive layer counts; for example 6, 9",
            )
        fits = self.adapter_rank >= 1 if self.adapters else self.adapter_rank == 0
        rank = f"adapter_rank={self.adapter_rank} with adapters={self.adapters}"
        require(fits, f"{rank}; give at least 1 with adapters, else 0")

    @property
    def exits(self) -> tuple[int, ...]:
        """All exits with a part, ascending."""
        return tuple(sorted({*self.heads, *self.adapters}))


NO_PARTS = ExitParts()


@dataclasses.dataclass(frozen=True)
class DraftConfig:
    """Where a sorted draft can be left, its default thresholds, and the parts that belong to single exits.

    Attributes:
        exit_layers: layer counts after which the shared norm and head may read the state, ascending.
        exit_thresholds: confidence above which a token leaves, one per exit; the last always accepts, so its threshold is 0.
        parts: heads and adapters that belong to some of these exits.

    Raises:
        UserError: for unsorted exits, a wrong number of thresholds, values outside [0, 1], or parts of other exits.
    """

    exit_layers: tuple[int, ...]
    exit_thresholds: tuple[float, ...] = ()
    parts: ExitParts = NO_PARTS

    def __post_init__(self):
        plain_fields(self)
        exits = self.exit_layers
        require(
            len(exits) > 0 and min(exits) >= 1 and list(exits) == sorted(set(exits)),
            f"exit_layers={exits} must be ascending positive layer counts; for example 6, 9, 12",
        )
        if not self.exit_thresholds:
            defaults = (0.5,) * (len(exits) - 1) + (0.0,)
            object.__setattr__(self, "exit_thresholds", defaults)
        check_thresholds(exits, self.exit_thresholds)
        missing = sorted(set(self.parts.exits) - set(exits))
        require(not missing, f"exit parts at {missing}, but exit_layers={exits}; add those exits")

    def check_depth(self, num_layers: int) -> None:
        """Raises UserError if an exit lies deeper than the draft's `num_layers`."""
        require(
            self.exit_layers[-1] <= num_layers,
            f"exit_layers={self.exit_layers} exceeds num_layers={num_layers}; drop the deepest exit",
        )


def check_thresholds(exits: tuple[int, ...], thresholds: tuple[float, ...]) -> None:
    """Raises UserError unless there is one threshold in [0, 1] per exit and the last one is 0."""
    require(
        len(thresholds) == len(exits),
        f"exit_thresholds={thresholds} has {len(thresholds)} values for {len(exits)} exits {exits}; give one per exit",
    )
    require(
        all(0.0 <= t <= 1.0 for t in thresholds),
        f"exit_thresholds={thresholds} must lie in [0, 1]: they are probabilities",
    )
    require(
        thresholds[-1] == 0.0,
        f"exit_thresholds={thresholds}: the last exit always accepts; set its threshold to 0",
    )
