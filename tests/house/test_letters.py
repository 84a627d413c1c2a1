"""The letters of axes in names are those of the legend in docs/architecture.md."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
_ROW = re.compile(r"^\| ((?:\w, )*\w) \| .+ \|$", re.MULTILINE)
_SUFFIX = re.compile(r"_?[a-z][a-z0-9_]*_([A-Z0-9k]*[A-Z][A-Z0-9k]*)")


def _legend() -> set[str]:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text.split("## Letters")[1].split("\n## ")[0]
    return {letter for letters in _ROW.findall(section) for letter in letters.split(", ")}


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
    used, legend = _letters_in_use(), _legend()
    unexplained = {letter: name for letter, name in used.items() if letter not in legend}
    assert not unexplained
    assert legend <= set(used)
