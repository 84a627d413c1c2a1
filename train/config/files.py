"""Configurations from strict YAML that holds differences only, with overrides from the command line."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import itertools
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro
import yaml

from s2d_jax.errors import UserError, require
from train.config.sections import Config


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `2e-5` as a string; here it is a number, as in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def load_config(path: str | Path) -> Config:
    """Reads a YAML file of differences from the defaults.

    Raises:
        UserError: for a file that cannot be read, an unknown key, a wrong type or a bad value.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give --config an existing YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    try:
        return _build(Config, {} if values is None else values, "")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _build(section: type, values: Any, prefix: str) -> Any:
    """A dataclass from plain YAML values, strictly."""
    where = prefix.rstrip(".") or "the file"
    require(isinstance(values, dict), f"{where} must hold `key: value` pairs, not {_kind(values)}")
    hints = typing.get_type_hints(section)
    for key in values:
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{close[0]}? " if close else ""
            raise UserError(f"unknown key {prefix}{key}; {hint}known keys: {', '.join(hints)}")
    for field in dataclasses.fields(section):
        required = field.default is dataclasses.MISSING
        require(
            not required or field.name in values,
            f"{prefix}{field.name} is missing; it has no default",
        )
    return section(
        **{key: _typed(hints[key], value, prefix + key) for key, value in values.items()}
    )


def _typed(hint: Any, value: Any, name: str) -> Any:
    """`value` as `hint`, or UserError; an int is taken where a float is asked for."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _build(hint, value, f"{name}.")
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        if value is None:
            return None
        return _typed(args[0], value, name)
    if origin is Literal:
        require(value in args, f"{name}={value!r} is unknown; use one of {', '.join(args)}")
        return value
    if origin is tuple:
        require(isinstance(value, list), f"{name}={value!r} must be a list, not {_kind(value)}")
        return tuple(_typed(args[0], item, f"{name}[{i}]") for i, item in enumerate(value))
    if hint is float and type(value) is int:
        return float(value)
    require(type(value) is hint, f"{name}={value!r} must be {_NAMES[hint]}, not {_kind(value)}")
    return value


_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_KINDS = {**_NAMES, list: "a list", dict: "a section", type(None): "empty"}


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), type(value).__name__)


def parse_command_line(arguments: list[str], prog: str) -> Config:
    """The configuration of `--config FILE --section.field value ...`; prints help for `--help` and exits.

    Raises:
        UserError: for anything wrong in the file or on the command line.
    """
    path, overrides = _split_config_flag(arguments)
    wants_help = "-h" in overrides or "--help" in overrides
    if path is None and not wants_help:
        raise UserError(
            "--config is missing; give a YAML file, for example configs/smollm2_demo.yaml"
        )
    default = tyro.MISSING_NONPROP if path is None else load_config(path)
    return parse_flags(Config, overrides, f"{prog} --config FILE", default)


Flags = TypeVar("Flags")


def parse_flags(
    flags: type[Flags], arguments: list[str], prog: str, default: Any = tyro.MISSING_NONPROP
) -> Flags:
    """A dataclass from the command line; prints help for `--help` and exits.

    Raises:
        UserError: for anything wrong on the command line.
    """
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return tyro.cli(
                flags,
                default=default,
                args=arguments,
                prog=prog,
                config=(tyro.conf.FlagConversionOff,),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_one_line(message.getvalue())) from None


def _split_config_flag(arguments: list[str]) -> tuple[str | None, list[str]]:
    rest, path = [], None
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--config":
            path = next(remaining, None)
            require(path is not None, "--config is the last word; give it a YAML file")
        elif argument.startswith("--config="):
            path = argument.removeprefix("--config=")
        else:
            rest.append(argument)
    return path, rest


def _one_line(box: str) -> str:
    """The message inside the box that tyro draws, in colour, Unicode or ASCII, with its first suggestion."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip("│| ") for line in plain.splitlines()[1:]]  # the first line is the title
    blocks = itertools.groupby(lines, key=lambda line: set(line) <= set("─-╰╯"))
    texts = [list(block) for is_rule, block in blocks if not is_rule]
    message = " ".join(" ".join(texts[0]).split()) if texts else "the command line is not valid"
    suggestions = [line.split()[0] for line in lines if re.match(r"--\w", line)]
    if "Perhaps you meant" in plain and suggestions:
        message += f"; did you mean {suggestions[0]}?"
    # tyro names the section before an error of ours, which names it already.
    return re.sub(r"^Error parsing (\w+: )?", "", message)
