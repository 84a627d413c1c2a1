"""Whether what a command will write can be written: known before models are loaded, not after hours of work."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from s2d_jax.errors import UserError, printable
from s2d_jax.files import local_path
from s2d_jax.progress.durations import CACHE_VARIABLE

_PROBE = b"writable"
# `os.path` below, because the methods of `Path` raise OSError for names that are too long.


def check_writable(path: Path, flag: str = "--out") -> Path:
    """The path of a file, once a file beside it could really be written; nothing is left of that one.

    Args:
        path: where the file will be; it may exist.
        flag: what gave it, for messages.

    Raises:
        UserError: for a directory, a device, a place elsewhere (gs://...), or where nothing can be written.
    """
    path = local_path(path, flag)
    if os.path.isdir(path):
        raise UserError(
            f"{flag} {printable(path)} is a directory; give the name of a file, such as {printable(path / 'FILE')}"
        )
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(
            f"{flag} {printable(path)} is a device or a pipe; give the name of a file, or leave {flag} out"
        )
    _try(path.parent, f".partial-{path.name}", f"{flag} {printable(path)}")
    return path


def check_directory(path: Path, flag: str = "--out") -> Path:
    """As `check_writable`, for a directory that files will be written into; it may exist."""
    path = local_path(path, flag)
    if os.path.exists(path) and not os.path.isdir(path):
        raise UserError(f"{flag} {printable(path)} is a file; give a directory")
    _try(path, ".partial-probe", f"{flag} {printable(path)}")
    return path


def check_cache_variable() -> None:
    """Raises UserError if $S2D_CACHE_DIR is set to a place where nothing can be kept."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        check_directory(Path(chosen), f"${CACHE_VARIABLE}")


def _try(directory: Path, name: str, what: str) -> None:
    """Writes a file into a directory, and removes it and the directories that were made for it.

    Permissions are not asked for: they say nothing about a superuser, full disks, or file systems that are read-only.
    """
    made: list[Path] = []
    probe = directory / name
    try:
        for missing in reversed(
            [d for d in (directory, *directory.parents) if not os.path.exists(d)]
        ):
            missing.mkdir()
            made.append(missing)
        # Another process may be writing under this name; then it can be written.
        with contextlib.suppress(FileExistsError), probe.open("xb") as file:
            made.append(probe)
            file.write(_PROBE)
    except OSError as error:
        blocking = next(
            (p for p in (directory, *directory.parents) if os.path.exists(p)), directory
        )
        reason = f"{printable(blocking)} is a file" if blocking.is_file() else error.strerror
        raise UserError(f"{what} cannot be written: {reason}; choose another place") from None
    finally:
        for path in reversed(made):
            with contextlib.suppress(OSError):  # another process has put something there
                path.rmdir() if path.is_dir() else path.unlink()
