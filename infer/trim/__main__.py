"""Trims a draft's head to the tokens that its targets write: `python -m infer.trim --draft DIR --answers FILE.jsonl`."""

from __future__ import annotations

from infer.trim.args import Args
from s2d_jax.cli.command import run_command_line, starting


def main() -> None:
    run_command_line(Args, _run)


def _run(args: Args) -> None:
    with starting():  # JAX
        from infer.trim.listing import trim
    trim(args)


if __name__ == "__main__":
    main()
