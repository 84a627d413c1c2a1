"""`python -m train.main --config configs/NAME.yaml [--section.field value ...]`"""

from __future__ import annotations

import sys

import datasets

from s2d_jax.config import UserError
from train.config import parse_command_line
from train.loop import train


def main(arguments: list[str] | None = None) -> int:
    """Runs a training; returns the exit status. A mistake of the user's is one line on stderr and status 2."""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        config = parse_command_line(
            sys.argv[1:] if arguments is None else arguments, "python -m train.main"
        )
        run_dir = train(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}; check the path, its permissions and the disk", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "interrupted; go on from the last checkpoint with --train.resume True", file=sys.stderr
        )
        return 130
    print(
        f"trained: {run_dir}\nexport with: python -m infer.export --run {run_dir} --out {run_dir}/export"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
