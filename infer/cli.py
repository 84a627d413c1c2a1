"""What the command lines of `infer` share: parsing, one-line errors, files written whole."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import tyro

from s2d_jax.config import UserError

Args = TypeVar("Args")


def run_command_line(args_type: type[Args], run: Callable[[Args], None]) -> None:
    """Parses `sys.argv` into `args_type` and runs; a mistake of the user's exits 2 with one line."""
    try:
        run(tyro.cli(args_type, config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {error}; check the path, its permissions and the disk", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; nothing half-written was left", file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path` and renames it at the end, or removes it on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
