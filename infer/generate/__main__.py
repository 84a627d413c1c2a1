"""Answers prompts: `python -m infer.generate --target DIR --draft DIR --prompt "..."`."""

from __future__ import annotations

import sys

from infer.generate.args import Args
from s2d_jax.cli.command import NOTHING_LEFT, run_command_line, starting


def main() -> None:
    run_command_line(Args, _run)


def _run(args: Args) -> None:
    with starting():  # JAX
        from infer.generate.answering import generate
        from s2d_jax.cli.together import done_together
    if args.cluster.ray is not None:  # decoders elsewhere, each of one process
        generate(args)
        return
    status = done_together(
        lambda: generate(args), lambda: NOTHING_LEFT, "start all again with the same command"
    )
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
