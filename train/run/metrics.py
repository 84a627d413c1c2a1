"""Metrics in files: JSON lines and TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from s2d_jax.errors import UserError
from s2d_jax.fields import REQUIRED, Fields
from s2d_jax.files import parse_json, read_text, write_text

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
_PER_EXIT = "loss_per_exit", "agreement_per_exit", "mat_per_exit"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file. Half a line at the end, which a killed run may leave, is none.

    Raises:
        UserError: if the file cannot be read, or a row is not one that training writes; the message names the line.
    """
    remedy = "remove that line, or move the file away to go on without it"
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(read_text(path, remedy).split("\n")[:-1], start=1):
        where = f"{path}, line {number}"
        row = Fields(parse_json(line, where, remedy), where, remedy)
        row.integer("step", 0)
        held_out = row.flag("held_out", False)
        for name in _PER_EXIT if held_out else _PER_EXIT[:1]:
            exits = row.fields(name)
            for layer in (rows[0] if rows else row.raw)["loss_per_exit"]:
                if not str(layer).isdecimal():
                    raise row.wrong(name, "an object of layer counts, such as 6")
                exits.number(layer, default=None if held_out else REQUIRED)
        rows.append(dict(row.raw))
    return rows


class MetricsFile:
    """Appends one JSON object per line, after removing what an earlier process wrote after `last_step`.

    It touches the file only if it is `active`, as in the main process. `tensorboard` is a directory that gets the same numbers.

    Raises:
        UserError: if there is a file already, and it is not one that training wrote.
    """

    def __init__(
        self, path: Path, *, last_step: int, active: bool = True, tensorboard: Path | None = None
    ):
        self._file = self._board = None
        if not active:
            return
        if tensorboard is not None:
            self._board = TensorBoardFile(tensorboard, resumed_after=last_step)
        kept = []
        if path.exists():
            rows = read_metrics(path)
            kept = [json.dumps(row) + "\n" for row in rows if row["step"] <= last_step]
        write_text(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Appends `row` at once, so that the file can be followed while the run goes on."""
        if self._file is not None:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
        if self._board is not None:
            self._board.write(row)

    def close(self) -> None:
        for file in (self._file, self._board):
            if file is not None:
                file.close()


class TensorBoardFile:
    """Writes the numbers of the metrics file for TensorBoard: `loss_per_exit/6` for an exit, `held_out/...` for held-out rows.

    Raises:
        UserError: if tensorboardX is not installed.
    """

    def __init__(self, directory: Path, *, resumed_after: int):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise UserError(
                "watch.tensorboard=True needs tensorboardX; python -m pip install 's2d-jax[tensorboard]'"
            ) from None
        # Hides what an earlier process wrote after its last checkpoint.
        self._writer = SummaryWriter(str(directory), purge_step=resumed_after + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Adds the numbers of one row."""
        prefix = "held_out/" if "held_out" in row else ""
        for name, value in row.items():
            values = value if isinstance(value, dict) else {None: value}
            for layer, number in values.items():
                if name not in ("step", "held_out") and number is not None:
                    tag = prefix + (name if layer is None else f"{name}/{layer}")
                    self._writer.add_scalar(tag, number, row["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def losses(row: dict[str, Any]) -> str:
    """`loss 2.31 (6: 2.60, 9: 2.25, 12: 2.08)`."""
    exits = ", ".join(f"{layer}: {loss:.3f}" for layer, loss in row["loss_per_exit"].items())
    return f"loss {row['loss']:.3f} ({exits})"
