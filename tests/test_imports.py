"""The direction of imports, and the size of files and functions."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("s2d_jax", "train", "infer")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# Each may import those to its left.
ORDER = ("config", "sharding", "kv_cache", "layers", "model", "drafters", "decoder", "generation")
WITHOUT_MODELS = ("sampling", "acceptance", "proposal", "tree")
ABOUT_MODELS = {"layers", "model", "drafters", "decoder", "generation", "pretrained"}
# Command lines print, parse arguments and draw; the library does not.
NOT_IN_LIBRARY = {"argparse", "tyro", "rich", "matplotlib", "torch", "train", "infer"}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    """Dotted names of everything that `path` imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def library_parts(path: Path) -> set[str]:
    """Which modules directly under s2d_jax are imported."""
    dotted = (name.split(".") for name in imports_of(path))
    return {parts[1] for parts in dotted if parts[0] == "s2d_jax" and len(parts) > 1}


def top_levels(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports_of(path)}


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_go_one_way(path):
    package, *rest = module_of(path).split(".")
    if package != "s2d_jax":
        other = {"train": "infer", "infer": "train"}[package]
        assert other not in top_levels(path)
        return
    assert not top_levels(path) & NOT_IN_LIBRARY
    part = rest[0] if rest else None
    if part in ORDER:
        later = set(ORDER[ORDER.index(part) + 1 :])
        assert not library_parts(path) & later
    if part in WITHOUT_MODELS:
        assert not library_parts(path) & ABOUT_MODELS


def test_imports_have_no_cycle():
    graph = {
        module_of(path): {name for name in imports_of(path) if name.startswith("s2d_jax.")}
        for path in SOURCES
        if module_of(path).startswith("s2d_jax.")
    }
    graph = {name: {n for n in used if n in graph and n != name} for name, used in graph.items()}
    while graph:
        leaves = {name for name, used in graph.items() if not used & graph.keys()}
        assert leaves, f"a cycle among {sorted(graph)}"
        graph = {name: used for name, used in graph.items() if name not in leaves}


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=module_of)
def test_files_and_functions_stay_small(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


def test_torch_is_not_imported_by_the_library():
    assert not [module_of(path) for path in SOURCES if "torch" in top_levels(path)]
