"""From the words of a command line to a dataclass of flags, and from tyro's message to one line."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import operator
import os
import re
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
import tyro.constructors

from s2d_jax.cli.outputs import check_cache_variable
from s2d_jax.errors import UserError
from s2d_jax.files import expanded

_COLUMNS = 100
_TRUTH = {"True": True, "true": True, "False": False, "false": False}
# What `tyro.conf.OmitArgPrefixes[...]` leaves in an annotation.
_UNNAMED = typing.get_args(tyro.conf.OmitArgPrefixes[int])[1]

Flags = TypeVar("Flags")


def parse(
    flags: type[Flags],
    arguments: Sequence[str] | None = None,
    default: Any = tyro.MISSING_NONPROP,
    module: str | None = None,
) -> Flags:
    """A dataclass from the command line; prints help for `--help`, versions for `--version`, and exits.

    Switches take no value and have a `--no-` form. The form with a value (`--train.resume True`) is read too.

    Args:
        flags: the dataclass.
        arguments: the words; None takes those of the process.
        default: an instance whose values take the place of the class's defaults.
        module: the command's module, which names the command if it was not started as one.

    Raises:
        UserError: for anything wrong on the command line, and where $S2D_CACHE_DIR cannot be written.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "--version" in words:
        _print_version()
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message), _at_most_columns():
            found = tyro.cli(
                flags,
                prog=program(module),
                description=_wrapped(flags.__doc__ or ""),
                args=_without_values(flags, words),
                default=default,
                registry=_REGISTRY,
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(f"{one_line(message.getvalue())}; --help lists the flags") from None
    check_cache_variable()
    return found


_REGISTRY = tyro.constructors.ConstructorRegistry()


@_REGISTRY.primitive_rule
def _optional(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """Shows `int | None` as INT, not as {None}|INT; None may still be given, to undo what a file says."""
    kinds = typing.get_args(info.type)
    if info.type_origin not in (types.UnionType, typing.Union) or type(None) not in kinds:
        return None
    inner = functools.reduce(operator.or_, (kind for kind in kinds if kind is not type(None)))
    spec = tyro.constructors.ConstructorRegistry.get_primitive_spec(
        tyro.constructors.PrimitiveTypeInfo.make(inner, info.markers)
    )
    assert isinstance(spec, tyro.constructors.PrimitiveConstructorSpec), spec
    return dataclasses.replace(
        spec,
        instance_from_str=lambda words: (
            None if words == ["None"] else spec.instance_from_str(words)
        ),
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: (
            ["none"] if value is None else spec.str_from_instance(value)
        ),
        choices=None if spec.choices is None else (*spec.choices, "None"),
    )


@_REGISTRY.primitive_rule
def _path(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """Expands `~`: shells do so only at the beginning of a word, not in `--out=~/answers.jsonl`."""
    if info.type is not Path:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: expanded(words[0]),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda value: [str(value)],
    )


def program(module: str | None = None) -> str:
    """What the user typed: `s2d-generate`, or `python -m infer.generate`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = Path(sys.argv[0]).name
    if _is_script():
        return name
    if spec is not None and spec.name.split(".")[0] in ("infer", "train"):
        module = spec.name.removesuffix(".__main__")
    return name if module is None else f"python -m {module}"


def other_command(module: str) -> str:
    """How the user would type another command: as a script if this one was a script."""
    return f"s2d-{module.rpartition('.')[2]}" if _is_script() else f"python -m {module}"


def _is_script() -> bool:
    return Path(sys.argv[0]).name.startswith("s2d-")


def _print_version() -> typing.NoReturn:
    # Imports JAX, to name the devices.
    from s2d_jax.cli.environment import versions
    from s2d_jax.machine import device_notice

    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    print("\n".join(device_notice()))
    sys.exit(0)


def _wrapped(docstring: str) -> str:
    """A docstring wrapped for `--help`, since tyro does not wrap it. It joins lines that begin with a letter."""
    paragraphs = inspect.cleandoc(docstring).split("\n\n")
    return "\n\n".join(
        textwrap.fill(paragraph, _width(), subsequent_indent="  ") for paragraph in paragraphs
    )


def _width() -> int:
    return min(_COLUMNS, shutil.get_terminal_size((_COLUMNS, 24)).columns)


@contextlib.contextmanager
def _at_most_columns() -> Iterator[None]:
    """Limits the width of help: tyro fills the terminal, and takes its width from COLUMNS if that is set."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(_width())
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _without_values(flags: type, words: list[str]) -> list[str]:
    """`--tree True` and `--tree=True` become `--tree`, `--tree False` `--no-tree`, and `--no-a.b` `--a.no-b`."""
    off = dict(_switches(flags, ""))
    written = {f"--no-{on.removeprefix('--')}": off[on] for on in off}
    found, left = [], collections.deque(words)
    while left:
        word = left.popleft()
        name, equals, value = word.partition("=")
        name = name.replace("_", "-") if name.startswith("--") else name
        if name not in off:
            found.append(written.get(name, word))
            continue
        if not equals and left and not left[0].startswith("-"):
            value, equals = left.popleft(), " "
        if equals and value not in _TRUTH:
            raise UserError(f"{name}{equals}{value}: give {name} or {off[name]}, without a value")
        found.append(name if _TRUTH.get(value, True) else off[name])
    return found


def _switches(flags: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """The switches of a dataclass of flags, with their `--no-` forms."""
    for field, hint in typing.get_type_hints(flags, include_extras=True).items():
        annotated = typing.get_origin(hint) is typing.Annotated
        kind = typing.get_args(hint)[0] if annotated else hint
        name = field.replace("_", "-")
        if kind is bool:
            yield f"--{prefix}{name}", f"--{prefix}no-{name}"
        elif dataclasses.is_dataclass(kind):
            yield from _switches(kind, prefix if goes_unnamed(hint) else f"{prefix}{name}.")


def goes_unnamed(hint: Any) -> bool:
    """Whether the flags of a section with this annotation are typed without the section's name."""
    marks = typing.get_args(hint)[1:]
    return any(mark is _UNNAMED or getattr(mark, "name", None) == "" for mark in marks)


def one_line(box: str) -> str:
    """The message inside the box that tyro draws, in colour, Unicode or ASCII, with its first suggestion."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip("│| ") for line in plain.splitlines()[1:]]  # the first line is the title
    blocks = itertools.groupby(lines, key=lambda line: set(line) <= set("─-╰╯+"))
    texts = [list(block) for is_rule, block in blocks if not is_rule]
    message = " ".join(" ".join(texts[0]).split()) if texts else "the command line is not valid"
    suggestions = [line.split()[0].rstrip(",") for line in lines if re.match(r"--\w", line)]
    if "Perhaps you meant" in plain and suggestions:
        message += f"; did you mean {suggestions[0]}?"
    # tyro puts the section before our error, which names it already.
    return re.sub(r"^Error parsing ([\w.]+: )?", "", message)
