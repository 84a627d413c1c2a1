"""Measures an accelerator: `python -m infer.accelerator_check --out DIR`."""

from __future__ import annotations

import sys

from infer.accelerator_check.args import Args
from s2d_jax.cli.command import starting, status_of
from s2d_jax.cli.parsing import parse


def main() -> None:
    told = "the parts that were finished are in the directory of --out"
    if status := status_of(lambda: _run(parse(Args)), told):
        sys.exit(status)


def _run(args: Args) -> None:
    with starting():  # JAX
        from infer.accelerator_check.check import check
    check(args)


if __name__ == "__main__":
    main()
