"""`python -m train.main --config configs/NAME.yaml [--section.field value ...]`"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable

from s2d_jax.cli.command import starting, status_of
from train.config.files import FlagsWithConfig, parse_command_line
from train.config.sections import Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(FlagsWithConfig):
    """Train a sorted draft. Every field of the configuration is a flag, and overrides the file.

    Most used beside --config: --model.path, --data.paths, --train.run-dir, --train.resume.
    """


def main(arguments: list[str] | None = None) -> int:
    """Runs a training; returns the exit status, 2 for a mistake of the user's. `train.run.command` lists the others."""
    found = []
    if status := status_of(lambda: found.extend(_begin(arguments))):
        return status
    run, config = found
    return run(config)


def _begin(arguments: list[str] | None) -> tuple[Callable[[Config], int], Config]:
    config = parse_command_line(Args, arguments, "train.main").settings
    with starting():  # JAX
        from train.run.command import run
    return run, config


if __name__ == "__main__":
    sys.exit(main())
