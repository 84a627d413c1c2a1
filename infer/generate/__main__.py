"""Answers prompts: `python -m infer.generate --target DIR --draft DIR --prompt "..."`."""

from __future__ import annotations

from infer.generate.args import Args
from s2d_jax.cli.command import run_command_line, starting


def main() -> None:
    run_command_line(Args, _run)


def _run(args: Args) -> None:
    with starting():  # JAX
        from infer.generate.answering import generate
        from s2d_jax.cli.together import do_together
    if args.cluster.ray is not None:  # decoders elsewhere, each of one process
        generate(args)
    else:
        do_together(generate, args)


if __name__ == "__main__":
    main()
