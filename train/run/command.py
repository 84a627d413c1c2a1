"""A run as a command: its exit status, and one line for what ends it."""

from __future__ import annotations

import sys

import datasets

from s2d_jax.cli.agreement import check_flags_agree
from s2d_jax.cli.parsing import other_command
from s2d_jax.cli.together import done_together
from s2d_jax.errors import visible
from s2d_jax.files import expanded
from s2d_jax.processes import is_main_process
from s2d_jax.weights.runs import CHECKPOINTS
from train.config.sections import Config
from train.run.preemption import PREEMPTED_STATUS, Preempted
from train.run.setup import train


def run(config: Config) -> int:
    """Trains; returns the exit status.

    A mistake of the user's is one line on stderr and status 2; a run that SIGTERM stopped and that can go on has status 75.
    Where several processes train together, the failure of one ends all.
    """
    datasets.disable_progress_bars()  # they know nothing of ours
    return done_together(
        lambda: _trained(config),
        lambda: _after_interrupt(config),
        "go on with --train.resume",
        preemption=True,
    )


def _trained(config: Config) -> int:
    check_flags_agree("train.main", config)
    try:
        run_dir = train(config)
    except Preempted as stop:
        print(f"{stop}; go on with --train.resume", file=sys.stderr)
        return PREEMPTED_STATUS
    if is_main_process():
        export = other_command("infer.export")
        words = f"{export} --run {run_dir} --out {run_dir}/export"
        print(visible(f"trained: {run_dir}\nexport with: {words}"))
    return 0


def _after_interrupt(config: Config) -> str:
    """What is true after Ctrl-C: there may be no checkpoint yet."""
    found = (expanded(config.train.run_dir) / CHECKPOINTS).glob("*")
    if any(path.name.isdigit() for path in found):
        return "go on from the last checkpoint with --train.resume"
    return f"no checkpoint was due yet (--train.checkpoint-every {config.train.checkpoint_every}), so nothing was saved"
