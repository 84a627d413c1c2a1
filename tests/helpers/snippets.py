"""The fenced blocks of Markdown files: Python that is run, and command lines that are understood, or run, without a shell."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import io
import re
import shlex
import sys
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path

from infer.bench.methods import parse_methods
from s2d_jax.cli.parsing import parse
from s2d_jax.errors import UserError
from train.config.files import FlagsWithConfig, parse_command_line

ROOT = Path(__file__).parents[2]
PYTHON, SHELL = {"python"}, {"", "sh", "bash", "console"}
_FENCE = re.compile(r"^ *(`{3,}|~{3,})(.*)$")
_ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")
_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block; `line` is that of its first line of text, counted from 1."""

    file: str
    line: int
    language: str
    text: str


@dataclasses.dataclass(frozen=True)
class Command:
    """A command line, its continuation lines joined."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"

    @property
    def words(self) -> list[str]:
        """Without assignments before it, and without the brackets around what may be left out."""
        text = re.sub(r"\[(--[^\]]*)\]", r"\1", self.text.removeprefix("$ "))
        words = shlex.split(text, comments=True)
        while words and _ASSIGNMENT.fullmatch(words[0]):
            del words[0]
        return _launched(words)


def _launched(words: list[str]) -> list[str]:
    """What a launcher is given to start; other words as they are."""
    match words:
        case ["gcloud", *_, "--command", text]:
            return shlex.split(text.rpartition("&& ")[2])
        case ["sbatch", script, module, *rest] if (ROOT / script).exists():
            return ["python", "-m", module, *rest]
    return words


def blocks_of(text: str, file: str) -> list[Block]:
    """All fenced blocks. Raises ValueError for one that is not closed."""
    found: list[Block] = []
    fence, language, begin, lines = "", "", 0, []
    for number, line in enumerate(text.splitlines(), start=1):
        match = _FENCE.match(line)
        if not fence and match:
            fence, language, begin, lines = match[1], match[2].strip(), number + 1, []
        elif fence and match and match[1].startswith(fence) and not match[2].strip():
            found.append(Block(file, begin, language, "\n".join(lines)))
            fence = ""
        elif fence:
            lines.append(line)
    if fence:
        raise ValueError(f"{file}:{begin - 1}: a block that is not closed")
    return found


def run_python(blocks: list[Block]) -> None:
    """Runs the blocks of one file one after another in one namespace, as a reader pastes them."""
    namespace = {"__name__": "__main__"}
    for block in blocks:
        # Tracebacks name the line of the Markdown file.
        code = "\n" * (block.line - 1) + block.text
        exec(compile(code, block.file, "exec"), namespace)


def commands_of(block: Block) -> list[Command]:
    """One for each line, or for several that are continued with a backslash."""
    found, waiting, begin = [], "", 0
    for number, line in enumerate(block.text.splitlines(), start=block.line):
        begin = begin if waiting else number
        waiting += line.strip()
        if waiting.endswith("\\"):
            waiting = waiting[:-1]
        elif waiting and not waiting.startswith("#"):
            found.append(Command(block.file, begin, waiting))
            waiting = ""
        else:
            waiting = ""
    return found


def commands_in_prose(text: str, file: str) -> Iterator[Command]:
    """What stands between single backticks and begins one of this project's commands with flags behind it."""
    for match in re.finditer(r"(?<!`)`([^`]+)`(?!`)", text):
        span = " ".join(match[1].split())
        if re.match(
            r"(python -m (infer|train)\.\S+|python docs/|s2d-\w+|pip install|make) ?\S", span
        ):
            yield Command(file, text[: match.start()].count("\n") + 1, span)


def starts_known(command: Command) -> bool:
    """Whether the line starts a command that `problem_of` knows."""
    match command.words:
        case ["python", "-m", module, *_]:
            return module.startswith(("infer.", "train."))
        case ["python", script, *_]:
            return script.endswith(".py")
        case ["kubectl", "apply", "-f", _]:
            return True
        case [name, *_]:
            return name in ("make", "pip") or name.startswith("s2d-")
    return False


def problem_of(command: Command, config: Path) -> str | None:
    """What is wrong with a command line, which is not run; None if its command would take it.

    Args:
        command: one that starts a known command.
        config: a file that takes the place of `--config FILE`.
    """
    try:
        _check(_filled(command.words, config))
    except (UserError, OSError, ValueError, ImportError) as error:
        return f"{command}: {' '.join(str(error).split())}"
    return None


def _filled(words: list[str], config: Path) -> list[str]:
    """With what a parser takes in place of placeholders and of files in the home; other placeholders are as good as any."""
    values = {("--config", "FILE"): str(config), ("--temperature", "T"): "0.5"}
    filled = [values.get(pair, pair[1]) for pair in zip(["", *words], words, strict=False)]
    return [str(config.with_name("home")) if word.startswith("~/") else word for word in filled]


def _check(words: list[str]) -> None:
    match words:
        case ["python", "-m", module, *rest]:
            _check_flags(module_of(module), rest)
        case ["python", script, *rest]:
            _check_script(ROOT / script, rest)
        case ["make", *targets]:
            known = re.findall(
                r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
            )
            for target in targets:
                _require("=" in target or target in known, f"no target {target} in the Makefile")
        case ["kubectl", "apply", "-f", file]:
            _require((ROOT / file).exists(), f"{file} does not exist")
        case ["pip", "install", *packages]:
            for package in packages:
                _check_package(package)
        case [script, *rest]:
            _require(script in _PROJECT["scripts"], f"{script} is no script of pyproject.toml")
            _check_flags(module_of(_PROJECT["scripts"][script].partition(":")[0]), rest)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def module_of(name: str) -> types.ModuleType:
    """The module that `python -m name` runs, imported without running it."""
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.submodule_search_locations is not None:
        name += ".__main__"
    return importlib.import_module(name)


def _check_flags(module: types.ModuleType, words: list[str]) -> None:
    """Parses as the command would."""
    if not words:  # the command is named, not called
        return
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            if issubclass(module.Args, FlagsWithConfig):
                parse_command_line(module.Args, words, module.__name__)
                return
            args = parse(module.Args, words, module=module.__name__)
        except SystemExit:  # --help, or the completion of a shell; a mistake is a UserError
            return
    if isinstance(methods := getattr(args, "methods", None), str):
        parse_methods(methods)


def _check_package(package: str) -> None:
    """The extras of this project exist; other packages are taken as they are."""
    name, _, extras = package.removesuffix("]").partition("[")
    if name in (".", _PROJECT["name"]) and extras:
        for extra in extras.split(","):
            known = _PROJECT["optional-dependencies"]
            _require(
                extra in known, f"no extra {extra} in pyproject.toml; known: {', '.join(known)}"
            )


def _check_script(path: Path, words: list[str]) -> None:
    """A script takes its words through tyro, argparse, or by their number. Commands among them are checked, too."""
    source = path.read_text(encoding="utf-8")
    if "--" in words:  # and behind it the words of another program
        behind = words.index("--")
        _check(["python", *words[behind + 1 :]])
        words = words[:behind]
    for word in words:
        if word.startswith("python "):
            _check(shlex.split(word))
    if "class Args" in source:
        _check_flags(_script_module(path), words)
    elif "argparse" in source:
        for flag in (word for word in words if word.startswith("--")):
            _require(f'"{flag}"' in source, f"{path.name} has no flag {flag}")
    else:
        fewest, most = _number_of_words(ast.parse(source))
        _require(
            fewest <= len(words) <= most,
            f"{path.name} takes {fewest} to {most} words, not {len(words)}",
        )


@functools.cache
def _script_module(path: Path) -> types.ModuleType:
    """A script with a main guard, imported. It stays in `sys.modules`, where its annotations are looked up."""
    spec = importlib.util.spec_from_file_location(f"docs_checks_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent))  # as for a script; some import their neighbours
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def _number_of_words(tree: ast.Module) -> tuple[int, float]:
    """How many words a script reads from `sys.argv`: at least those outside of `... if len(sys.argv) > N else ...`."""
    optional = {
        id(n) for node in ast.walk(tree) if isinstance(node, ast.IfExp) for n in ast.walk(node.body)
    }
    fewest, most = 0, 0.0
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Subscript) and ast.unparse(node.value) == "sys.argv"):
            continue
        index = node.slice
        is_open = isinstance(index, ast.Slice) and index.upper is None
        if isinstance(index, ast.Slice):
            bound = index.lower if is_open else index.upper
            last = ast.literal_eval(bound) - 1 if bound is not None else 0
        else:
            last = ast.literal_eval(index)
        most = float("inf") if is_open else max(most, last)
        fewest = fewest if id(node) in optional else max(fewest, last)
    return fewest, most


def run_command(command: Command) -> None:
    """Calls a command's `main` in this process. Raises AssertionError if it fails."""
    words = command.words
    assert words[:2] == ["python", "-m"], f"{command}: only modules are run"
    before, sys.argv = sys.argv, ["prog", *words[3:]]
    try:
        status = module_of(words[2]).main()
    except SystemExit as stop:
        status = stop.code
    finally:
        sys.argv = before
    assert status in (0, None), f"{command}: exit status {status}"
