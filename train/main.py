"""`python -m train.main --config configs/NAME.yaml [--section.field value ...]`"""

from __future__ import annotations

import sys
import traceback

import datasets
import jax

from s2d_jax.errors import UserError
from train.config.files import parse_command_line
from train.run.preemption import PREEMPTED_STATUS, Preempted
from train.run.processes import end_all, ending_together, is_main_process, start_processes
from train.run.setup import train


def main(arguments: list[str] | None = None) -> int:
    """Runs a training; returns the exit status.

    A mistake of the user's is one line on stderr and status 2; a run that SIGTERM stopped and that can go on has status 75.
    Where several processes train together, the failure of one ends all.
    """
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        config = parse_command_line(
            sys.argv[1:] if arguments is None else arguments, "python -m train.main"
        )
        start_processes()
        with ending_together():
            run_dir = train(config)
    except UserError as error:
        return _failed(2, f"error: {error}")
    except OSError as error:
        return _failed(2, f"error: {error}; check the path, its permissions and the disk")
    except Preempted as stop:
        print(f"{stop}; go on with --train.resume True", file=sys.stderr)
        return PREEMPTED_STATUS
    except KeyboardInterrupt:
        return _failed(130, "interrupted; go on from the last checkpoint with --train.resume True")
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        words = " ".join(str(error).split())[:160]
        return _failed(
            1,
            f"error: {words}; most often another process is gone: see what it said, then go on with --train.resume True",
        )
    except Exception as error:
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        return _failed(1, f"error: {type(error).__name__}, see the lines above")
    if is_main_process():
        print(
            f"trained: {run_dir}\nexport with: python -m infer.export --run {run_dir} --out {run_dir}/export"
        )
    return 0


def _failed(status: int, message: str) -> int:
    print(message, file=sys.stderr)
    end_all(status, message.removeprefix("error: "))
    return status


if __name__ == "__main__":
    sys.exit(main())
