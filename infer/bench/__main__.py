"""Measures speedup and acceptance: `python -m infer.bench --target DIR --draft DIR ...`."""

from __future__ import annotations

from infer.bench.args import Args
from s2d_jax.cli.command import run_command_line, starting


def main() -> None:
    run_command_line(Args, _run)


def _run(args: Args) -> None:
    with starting():  # JAX
        from infer.bench.comparison import bench
        from s2d_jax.cli.together import do_together
    do_together(bench, args)


if __name__ == "__main__":
    main()
