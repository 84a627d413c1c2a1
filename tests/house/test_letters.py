"""The letters of axes in names are those of the legend in docs/architecture.md."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
_ROW = re.compile(r"\| (\w) \| (.+) \|")
_SUFFIX = re.compile(r"_?[a-z][a-z0-9_]*_([A-Z0-9k]*[A-Z][A-Z0-9k]*)")


def _legend() -> list[tuple[str, str]]:
    """Each row: the letter, and the axis that it stands for."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text.split("## Letters")[1].split("\n## ")[0]
    _, _, *rows = [line for line in section.splitlines() if line.startswith("|")]
    matches = [_ROW.fullmatch(row) for row in rows]
    assert None not in matches, "a row of the legend is not `| letter | axis |`"
    return [match.groups() for match in matches]


def _letters_in_use() -> dict[str, str]:
    """Each letter, and a name that has it."""
    found = {}
    for package in ("s2d_jax", "infer", "train"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                name = getattr(node, "id", None) or getattr(node, "arg", None)
                if isinstance(name, str) and (match := _SUFFIX.fullmatch(name)):
                    found |= {
                        letter: f"{name} in {path}" for letter in match[1] if letter.isalpha()
                    }
    return found


def test_every_letter_is_explained_and_used():
    used, legend = _letters_in_use(), {letter for letter, _ in _legend()}
    unexplained = {letter: name for letter, name in used.items() if letter not in legend}
    assert not unexplained
    assert legend <= set(used)


def test_a_letter_is_one_axis():
    letters = [letter for letter, _ in _legend()]
    assert len(letters) == len(set(letters)), "a letter stands in two rows"
    assert not [axis for _, axis in _legend() if ";" in axis], "a row has two meanings"
