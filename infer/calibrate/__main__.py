"""Computes how to decode with a target and a draft on this machine: `python -m infer.calibrate --target DIR --draft DIR`."""

from __future__ import annotations

from infer.calibrate.args import Args
from s2d_jax.cli.command import run_command_line, starting


def main() -> None:
    run_command_line(Args, _run)


def _run(args: Args) -> None:
    with starting():  # JAX
        from infer.calibrate.choosing import calibrate
        from s2d_jax.cli.together import do_together
    do_together(calibrate, args)


if __name__ == "__main__":
    main()
