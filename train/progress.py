"""What a run tells while it trains: metrics.jsonl, and a progress bar or, without a terminal, a line now and then."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from s2d_jax.config import UserError
from s2d_jax.files import write_text

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
_SECONDS_BETWEEN_LINES = 10.0


class MetricsFile:
    """Appends one JSON object per line, after dropping what an earlier process wrote beyond `last_step`.

    Only an `active` one touches the file: the main process's. `tensorboard` names a directory that gets the same numbers.
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
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            # A killed run may leave half a line at the end.
            whole = [line for line in lines if line.endswith("\n")]
            kept = [line for line in whole if json.loads(line)["step"] <= last_step]
        write_text(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Appends `row` at once, so that it can be followed while the run goes on."""
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
        # What an earlier process wrote beyond its last checkpoint is hidden.
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


class ProgressReport:
    """A bar with ETA, tokens per second and the loss of each exit; plain lines where there is no terminal.

    Use as a context manager.
    """

    def __init__(self, console: Console | None = None):
        self._console = console or Console()
        self._bar: Progress | None = None
        self._last_line = 0.0

    def __enter__(self) -> ProgressReport:
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(),
                TimeRemainingColumn(elapsed_when_finished=True),
                TextColumn("{task.fields[numbers]}"),
                console=self._console,
                speed_estimate_period=600.0,  # seconds; lines may come minutes apart
            )
            self._task = self._bar.add_task("training", total=1.0, numbers="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """One line that stays."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def working(self, what: str, done: int, total: int) -> None:
        """Shows how far something before training is; from `done == total` on no longer."""
        if self._bar is not None:
            old = [task.id for task in self._bar.tasks if task.id != self._task]
            if not old:
                old = [self._bar.add_task(what, numbers="")]
            self._bar.update(old[0], description=what, completed=done, total=total)
            if done == total:
                self._bar.remove_task(old[0])
            return
        now = time.perf_counter()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            self.say(what if total == 1 else f"{what}: {done:,} of {total:,}")

    def update(self, share: float, row: dict[str, Any]) -> None:
        """Shows a line of metrics; `share` of the run is over."""
        numbers = f"step {row['step']}  {row['tokens_per_second']:,.0f} tok/s  {losses(row)}"
        if self._bar is not None:
            self._bar.update(self._task, completed=share, numbers=numbers)
            return
        now = time.perf_counter()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES or share >= 1:
            self._last_line = now
            left = row["elapsed_seconds"] * (1 - share) / share
            self.say(f"{share:4.0%}  {numbers}  {left:,.0f} s left")


def losses(row: dict[str, Any]) -> str:
    """`loss 2.31 (6: 2.60, 9: 2.25, 12: 2.08)`."""
    exits = ", ".join(f"{layer}: {loss:.3f}" for layer, loss in row["loss_per_exit"].items())
    return f"loss {row['loss']:.3f} ({exits})"
