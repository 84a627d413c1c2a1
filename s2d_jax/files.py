"""Files: texts and JSON are read here and nowhere else, and what is written is written whole or not at all."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import re
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from s2d_jax.errors import UserError, printable

# What comes with s2d-jax: configurations of training and prompts, in `configs`.
SHIPPED = Path(__file__).parent / "shipped"

_GZIP, _UTF_16 = b"\x1f\x8b", (b"\xff\xfe", b"\xfe\xff")
_MOST_UNPACKED = 2**31
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_SURROGATE = re.compile(r"[\ud800-\udfff]|\\u[dD][89a-fA-F]")


def here_or_shipped(path: str | Path) -> Path:
    """`path`; if it does not exist and reads `configs/NAME`, the file of that name that comes with s2d-jax."""
    path = Path(path).expanduser()
    shipped = SHIPPED / path
    is_shipped = path.parts[:1] == ("configs",) and ".." not in path.parts and shipped.is_file()
    return shipped if is_shipped and not path.exists() else path


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; renames it at the end, or removes it on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file of UTF-8 text, whole or not at all."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def regular_file(path: Path, remedy: str) -> Path:
    """`path`, if it is a file, or a link to one. A FIFO, which could be waited for forever, is none.

    Args:
        path: where a file is expected.
        remedy: the end of the message, such as "give a .jsonl file of prompts".

    Raises:
        UserError: if there is no file, or it is of another kind.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a name with NUL in it
        absent = isinstance(error, FileNotFoundError | NotADirectoryError)
        reason = "does not exist" if absent else f"cannot be read ({_reason(error)})"
        raise UserError(f"{printable(path)} {reason}; {remedy}") from None
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a device or a pipe"
        raise UserError(f"{printable(path)} is {kind}, a file is expected; {remedy}")
    return path


def check_no_lfs_pointer(path: Path) -> None:
    """Raises UserError if a file holds what git-lfs leaves in its place until it is fetched."""
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise UserError(
                f"{path} is a git-lfs pointer, not the file itself; fetch it: git lfs pull (in the repository's directory)"
            )


def read_text(path: Path, remedy: str = "give another file") -> str:
    """The text of a file in UTF-8, with or without a byte order mark, as it is or packed by gzip.

    Line ends stay as they are.

    Raises:
        UserError: if there is no such file, it cannot be read, or holds something else; the message names the line.
    """
    try:
        data = regular_file(path, remedy).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({_reason(error)}); {remedy}") from None
    if data.startswith(_GZIP):
        data = _unpacked(data, path)
    if data.startswith(_UTF_16):
        raise UserError(f"{path} is UTF-16; convert it: iconv -f UTF-16 -t UTF-8 {path.name} > NEW")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line}: not UTF-8 at byte {error.start}; convert the file, or {remedy}"
        ) from None


def _unpacked(data: bytes, path: Path) -> bytes:
    """What gzip packed; UserError if it is damaged, or so large that it may have been made to fill the memory."""
    try:
        with gzip.open(io.BytesIO(data)) as file:
            text = file.read(_MOST_UNPACKED + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged gzip ({_reason(error)}); fetch it again") from None
    if len(text) > _MOST_UNPACKED:
        raise UserError(
            f"{path} unpacks to more than {_MOST_UNPACKED >> 30} GiB; unpack it with gunzip and give the result"
        )
    return text


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())


def parse_json(text: str, where: str, remedy: str = "fetch it again") -> Any:
    """A parsed JSON text. Half a surrogate pair, which no UTF-8 can hold, becomes U+FFFD.

    Args:
        text: the JSON.
        where: where it stands, for messages.
        remedy: their end.

    Raises:
        UserError: if it is not valid, is nested too deeply, or holds a number of thousands of digits.
    """
    try:
        value = json.loads(text)
        return _whole_characters(value) if _SURROGATE.search(text) else value
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise UserError(f"{where} is not valid JSON ({error.msg}: {place}); {remedy}") from None
    except RecursionError:
        raise UserError(f"{where} is not usable JSON (nested too deeply); {remedy}") from None
    except ValueError:
        raise UserError(
            f"{where} is not usable JSON (a number of thousands of digits); {remedy}"
        ) from None


def whole_characters(text: str) -> str:
    """`text` with U+FFFD for each half of a surrogate pair; no UTF-8 can hold one, and tokenizers refuse it."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _whole_characters(value: Any) -> Any:
    if isinstance(value, str):
        return whole_characters(value)
    if isinstance(value, list):
        return [_whole_characters(entry) for entry in value]
    if isinstance(value, dict):
        return {whole_characters(key): _whole_characters(entry) for key, entry in value.items()}
    return value


def read_json(path: Path, remedy: str = "fetch it again") -> dict[str, Any]:
    """A parsed JSON object.

    Raises:
        UserError: as `read_text` and `parse_json`, and if the file holds something other than an object.
    """
    value = parse_json(read_text(path, remedy), str(path), remedy)
    if not isinstance(value, dict):
        raise UserError(
            f"{path} holds a JSON {type(value).__name__}, an object is expected; {remedy}"
        )
    return value
