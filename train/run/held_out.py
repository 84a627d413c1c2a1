"""Evaluation on the held-out rows: loss and acceptance of every exit, in the metrics file and as a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from s2d_jax.progress.activity import activity
from s2d_jax.progress.state import Activity
from s2d_jax.sharding import fetch_whole
from train.config.sections import Config
from train.data.batch import Batch
from train.data.batches import batches_of
from train.objective.labels import TokenValues
from train.run.implied_acceptance import acceptance, answers_of_row

# (params, batch) -> `Reading.watched` at every position
EvalStep = Callable[[Any, Batch], TokenValues]


@dataclasses.dataclass(frozen=True)
class Watch:
    """Measures a draft on the held-out rows.

    Attributes:
        config: the run.
        held_out: indices of rows.
        make: `indices -> Batch`.
        expected_tokens: int32, the token that the watched target would write at each position of the held-out rows; None takes
            the answers' own tokens, which are the same if the target wrote them greedily.
    """

    config: Config
    held_out: np.ndarray
    make: Callable[[np.ndarray], Batch]
    expected_tokens: np.ndarray | None = None

    def evaluate(self, step: EvalStep, params: Any) -> dict[str, Any] | None:
        """The row of the metrics file for these parameters; None if nothing is held out.

        Returns:
            `loss` (the exits' weighted cross-entropy), `loss_per_exit`, and what `acceptance` returns.
        """
        with activity(
            f"evaluating on {len(self.held_out)} held-out rows", total=len(self.held_out)
        ) as told:
            return self._evaluate(step, params, told)

    def _evaluate(self, step: EvalStep, params: Any, told: Activity) -> dict[str, Any] | None:
        draft = self.config.draft
        ce_E, answers = np.zeros(len(draft.exit_layers)), []
        for places, batch in batches_of(self.held_out, self.config.train.batch_size, self.make):
            values = jax.device_get(step(params, batch))
            tokens_BT, weights_BT = fetch_whole((batch.targets_BT, batch.weights_BT))
            ce_E += values["ce"].sum(axis=(1, 2))
            for row in np.flatnonzero(places >= 0):
                expected_T = tokens_BT[row]
                if self.expected_tokens is not None:
                    expected_T = self.expected_tokens[places[row]]
                agrees_ET = values["best"][:, row] == expected_T
                counted_T = weights_BT[row] > 0
                answers += answers_of_row(counted_T, agrees_ET, values["confidence"][:, row])
            told.advance(int((places >= 0).sum()))
        counted = sum(answer.agrees_ET.shape[1] for answer in answers)
        if not counted:
            return None
        losses = (ce_E / counted).tolist()
        return {
            "loss": float(np.average(losses, weights=draft.loss_weights)),
            "loss_per_exit": dict(zip(map(str, draft.exit_layers), losses, strict=True)),
            **acceptance(
                answers,
                draft.exit_layers,
                draft.draft_config().exit_thresholds,
                self.config.watch.draft_tokens,
            ),
        }


def summary(row: dict[str, Any]) -> str:
    """One line: `agreement (6: 21.0%, 12: 30.1%), MAT (6: 1.25, 12: 1.40), S2D 1.36 (6: 40%, 12: 60%)`."""
    agreement = ", ".join(f"{k}: {v:.1%}" for k, v in row["agreement_per_exit"].items())
    mat = ", ".join(f"{k}: {_number(v)}" for k, v in row["mat_per_exit"].items())
    line = f"agreement ({agreement}), MAT ({mat})"
    if len(row["exit_histogram"]) > 1:
        exits = ", ".join(f"{k}: {v:.0%}" for k, v in row["exit_histogram"].items())
        line += f", S2D {_number(row['s2d_mat'])} ({exits})"
    return line


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
