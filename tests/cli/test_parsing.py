"""What all command lines have in common: switches, `--help`, `--version`, one line for a mistake."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
import tyro

from s2d_jax.cli.flags import Switch, flag
from s2d_jax.cli.parsing import one_line, other_command, parse, program
from s2d_jax.errors import UserError

COMMANDS = (
    "infer.generate", "infer.bench", "infer.calibrate", "infer.trim", "infer.export", "infer.demo_model",
    "infer.accelerator_check", "train.main", "train.plan", "train.memory",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Inner:
    """A group."""

    resume: Switch = False
    """Go on."""
    remat: Switch = True
    """Compute again."""
    limit: int | None = None
    """A limit."""


@dataclasses.dataclass(frozen=True)
class Outer:
    """A command."""

    name: str = ""
    """Any text."""
    tree: Switch = False
    """A tree."""
    file: Annotated[str | None, flag("FILE", "none is read")] = None
    """A file."""
    train: Inner = Inner()


@dataclasses.dataclass(frozen=True)
class Flat:
    tree: Switch = False
    train: Inner = Inner()


@pytest.mark.parametrize(
    ("words", "tree", "resume", "remat"),
    [
        ((), False, False, True),
        (("--tree", "--train.resume", "--train.no-remat"), True, True, False),
        (("--no-tree", "--train.no-resume", "--train.remat"), False, False, True),
        (("--tree", "True", "--train.resume", "true", "--train.remat", "False"), True, True, False),
        (("--tree=True", "--train.resume=True", "--train.remat=false"), True, True, False),
        (("--no-train.remat", "--tree"), True, False, False),
        (("--train.no_remat", "--tree"), True, False, False),
    ],
)
def test_switches_take_no_value_and_the_old_forms_still_work(words, tree, resume, remat):
    found = parse(Flat, words)
    assert (found.tree, found.train.resume, found.train.remat) == (tree, resume, remat)


def test_a_text_that_looks_like_a_truth_value_stays_a_text():
    assert parse(Outer, ("--name", "True", "--file=False")) == Outer(name="True", file="False")


def test_switches_of_groups_are_found_under_their_names():
    @dataclasses.dataclass(frozen=True)
    class Groups:
        unnamed: Annotated[Inner, tyro.conf.arg(name="")] = Inner()

    @dataclasses.dataclass(frozen=True)
    class Omitted:
        group: tyro.conf.OmitArgPrefixes[Inner] = Inner()

    for groups in (Groups, Omitted):
        found = parse(groups, ("--resume", "True", "--remat", "False"))
        (inner,) = vars(found).values()
        assert inner == Inner(resume=True, remat=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tree=3",), "--tree=3: give --tree or --no-tree, without a value"),
        (("--treee",), "Unrecognized options: --treee; did you mean --tree?; --help lists the"),
        (("--train.limit", "x"), "--train.limit: "),
    ],
)
def test_a_mistake_is_one_line(words, message):
    with pytest.raises(UserError) as error:
        parse(Flat, words)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not set("│╭─+|") & set(str(error.value))


def test_a_box_of_ascii_is_read_as_one_of_lines():
    lines = (
        "Parsing error",
        "Unrecognized options: --x",
        "",
        "Perhaps you meant:",
        "--y, --no-y INT",
    )
    ascii_box = "\n".join(
        ["+- " + lines[0] + " -+", *(f"| {line:40} |" for line in lines[1:]), "+---+"]
    )
    assert one_line(ascii_box).startswith("Unrecognized options: --x")


def test_none_may_be_given_and_is_not_shown(capsys):
    assert parse(Flat, ("--train.limit", "None"), Flat(train=Inner(limit=3))).train.limit is None
    with pytest.raises(SystemExit):
        parse(Outer, ("--help",))
    shown = capsys.readouterr().out
    assert "--train.limit INT" in shown
    assert "(default: none is read)" in shown
    assert "{None}" not in shown
    assert "default: None" not in shown


def test_programs_have_the_names_that_users_typed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/s2d-generate"])
    assert program("infer.generate") == "s2d-generate"
    assert other_command("infer.export") == "s2d-export"
    monkeypatch.setattr(sys, "argv", ["/somewhere/train/main.py"])
    assert program("train.main") == "python -m train.main"
    assert other_command("infer.export") == "python -m infer.export"


def show_help(command: str, monkeypatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    suffix = "" if command in ("infer.export", "infer.demo_model", "train.main") else ".__main__"
    with contextlib.suppress(SystemExit):
        importlib.import_module(command + suffix).main()


@pytest.mark.parametrize("columns", [80, 300])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_the_screen_and_says_what_is_taken(command, columns, monkeypatch, capsys):
    show_help(command, monkeypatch, columns)
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert len(lines[0]) <= 100  # tyro does not wrap the line of usage
    assert max(map(len, lines[1:])) <= min(columns, 100)
    assert "{None}" not in shown
    assert "default: None" not in shown
    assert "Default:" not in shown
    assert "default: )" not in shown
    assert not re.search(r"(True|False)\b", shown)
    # What everyone needs stands first: the first box has five flags of its own at most.
    first = shown.split("╰")[0]
    own = re.findall(r"^│ --[\w.-]+", first, re.MULTILINE)
    if command not in ("train.plan", "train.memory"):
        assert len(own) <= 5, own


@pytest.mark.parametrize("command", ["infer.generate", "train.main"])
def test_shell_completion_is_written(command):
    done = subprocess.run(
        [sys.executable, "-m", command, "--tyro-print-completion", "bash"],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    flag_of = {"infer.generate": "--max-new-tokens", "train.main": "--train.run-dir"}[command]
    assert flag_of in done.stdout


def test_version_names_versions_and_devices(monkeypatch, capsys):
    import jax

    with pytest.raises(SystemExit) as stop:
        parse(Flat, ("--version",))
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert re.search(r"s2d_jax \d+\.\d+", shown)
    assert f"jax {jax.__version__}" in shown
    assert "devices: " in shown
