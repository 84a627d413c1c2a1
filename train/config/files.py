"""Configurations from strict YAML that holds only differences from the defaults, with overrides from the command line."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
import yaml

from s2d_jax.cli.flags import flag
from s2d_jax.cli.parsing import parse
from s2d_jax.errors import UserError, printable, require, shown, told_of
from s2d_jax.files import SHIPPED, here_or_shipped
from s2d_jax.formats.yaml_file import read_yaml
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
    file = here_or_shipped(path)
    values = read_yaml(file, "give --config a YAML file of what differs from the defaults", _Loader)
    with told_of(file):
        return _build(Config, {} if values is None else values, "")


def _build(section: type, values: Any, prefix: str) -> Any:
    """A dataclass from plain YAML values, strictly."""
    where = prefix.rstrip(".") or "the file"
    require(isinstance(values, dict), f"{where} must hold `key: value` pairs, not {_kind(values)}")
    hints = typing.get_type_hints(section)
    for key in values:
        if key not in hints:
            close = difflib.get_close_matches(str(key)[:100], hints, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{close[0]}? " if close else ""
            raise UserError(
                f"unknown key {prefix}{_named(key)}; {hint}known keys: {', '.join(hints)}"
            )
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
    if isinstance(value, bool):
        value = _FORMER_SWITCHES.get(name, {}).get(value, value)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        if value is None:
            return None
        return _typed(args[0], value, name)
    if origin is Literal:
        require(value in args, f"{name}={shown(value)} is unknown; use one of {', '.join(args)}")
        return value
    if origin is tuple:
        require(
            isinstance(value, list), f"{name}={shown(value)} must be a list, not {_kind(value)}"
        )
        return tuple(_typed(args[0], item, f"{name}[{i}]") for i, item in enumerate(value))
    if hint is float and type(value) is int:
        return float(value)
    require(
        type(value) is hint, f"{name}={shown(value)} must be {_NAMES[hint]}, not {_kind(value)}"
    )
    return value


# Files of earlier versions, and of earlier runs, say true or false where there are names today.
_FORMER_SWITCHES = {"model.remat": {True: "block", False: "none"}}
_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_KINDS = {**_NAMES, list: "a list", dict: "a section", type(None): "empty"}


def _named(key: Any) -> str:
    """A key as a message shows it."""
    return printable(key) if isinstance(key, str) and len(key) <= 60 else shown(key)


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), type(value).__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlagsWithConfig:
    """The flags of a command that reads a configuration: its own, `--config`, and every field of the configuration."""

    config: Annotated[Path, flag("FILE")]
    """YAML with what differs from the defaults. configs/NAME.yaml, which come with s2d-jax, are found from any directory."""
    settings: Annotated[Config, tyro.conf.arg(name="")]


Flags = TypeVar("Flags", bound=FlagsWithConfig)


def parse_command_line(flags: type[Flags], arguments: Sequence[str] | None, module: str) -> Flags:
    """The flags `--config FILE --section.field value ...`; prints help for `--help` and exits.

    Args:
        flags: the command's own, with those of the configuration.
        arguments: the words; None takes those of the process.
        module: the command's module.

    Raises:
        UserError: for anything wrong in the file or on the command line.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    path = _config_in(words)
    if path is None:
        known = sorted(file.stem for file in (SHIPPED / "configs").glob("*.yaml"))
        require(
            any(word in ("-h", "--help", "--version") or "--tyro-" in word for word in words),
            f"--config is missing; give a YAML file, such as configs/NAME.yaml with NAME of {', '.join(known)}",
        )
        return parse(flags, words, module=module)
    own = {
        field.name: field.default
        for field in dataclasses.fields(flags)
        if field.name not in ("config", "settings")
    }
    default = flags(config=Path(path), settings=load_config(path), **own)
    return parse(flags, words, default, module)


def _config_in(words: list[str]) -> str | None:
    for word, value in itertools.zip_longest(words, words[1:]):
        if word == "--config":
            require(value is not None, "--config is the last word; give it a YAML file")
            return value
        if word.startswith("--config="):
            return word.removeprefix("--config=")
    return None
