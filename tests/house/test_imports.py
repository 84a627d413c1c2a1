"""The direction of imports, the size of files, and what an import loads. Run as a program, it prints a report."""

from __future__ import annotations

import ast
import collections
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The sub-packages, and the modules beside them, of each package: a module imports from its own and from those further up.
# Those on one line do not import each other.
WINGS = {
    "s2d_jax": (
        "errors version",
        "files machine fields backends processes",
        "compilers",
        "progress",
        "config",
        "sharding sampling",
        "formats",
        "model text",
        "draft weights",
        "decode",
        "tree",
        "generation",
        "calibration",
        "cli",
    ),
    "infer": ("demo_model export trim calibrate", "bench generate", "accelerator_check"),
    "train": ("config", "data", "objective", "step", "medusa", "run plan", "memory main"),
}
# `infer` and `train` do not know each other, but for what measures training beside decoding.
LOOKS_AT_TRAINING = ("infer.accelerator_check.training",)
PACKAGES = tuple(WINGS)
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
# Command lines print, parse arguments and draw; the library beside `s2d_jax.cli` does not, but shows progress where it is seen.
NOT_IN_LIBRARY = {"argparse", "tyro", "rich", "matplotlib"}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> Iterator[str]:
    """Dotted names of everything that `path` imports, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _modules_imported(path: Path) -> set[str]:
    """Those of this project's modules that `path` imports."""
    names = set(imports_of(path))
    return {name if name in MODULES else name.rpartition(".")[0] for name in names} & MODULES.keys()


MODULES = {module_of(path): path for path in SOURCES}
GRAPH = {module: _modules_imported(path) - {module} for module, path in MODULES.items()}


def wing_of(module: str) -> tuple[str, str]:
    """The package and the wing of a module; the wing of a package's own `__init__` is empty."""
    package, _, rest = module.partition(".")
    return package, rest.partition(".")[0]


def level_of(module: str) -> int:
    """The line of WINGS that the module's wing stands in; whoever imports `s2d_jax` itself gets all of its public names."""
    package, wing = wing_of(module)
    levels = [number for number, line in enumerate(WINGS[package]) if wing in line.split()]
    return levels[0] if wing else len(WINGS[package])


def test_every_module_stands_in_the_table():
    found = {wing_of(module) for module in MODULES if "." in module}
    listed = {
        (name, wing) for name, lines in WINGS.items() for line in lines for wing in line.split()
    }
    assert found == listed


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    package, wing = wing_of(module)
    for imported in GRAPH[module]:
        other_package, other_wing = wing_of(imported)
        if other_package == "train" and module in LOOKS_AT_TRAINING:
            continue
        if other_package != package:
            assert other_package == "s2d_jax", f"{module} imports {imported}"
        elif wing and other_wing != wing:
            assert level_of(imported) < level_of(module), f"{module} imports {imported}"


def test_imports_have_no_circle():
    graph = dict(GRAPH)
    while graph:
        leaves = {name for name, used in graph.items() if not used & graph.keys()}
        assert leaves, f"a circle among {sorted(graph)}"
        graph = {name: used for name, used in graph.items() if name not in leaves}


@pytest.mark.parametrize("module", MODULES)
def test_libraries_stay_where_they_belong(module):
    top_levels = {name.split(".")[0] for name in imports_of(MODULES[module])}
    assert "torch" not in top_levels
    if wing_of(module)[0] == "s2d_jax" and wing_of(module)[1] != "cli":
        allowed = {"rich"} if module == "s2d_jax.progress.displays" else set()
        assert not top_levels & NOT_IN_LIBRARY - allowed


@pytest.mark.parametrize("module", [m for m in MODULES if MODULES[m].name == "__init__.py"])
def test_a_folder_says_what_belongs_there(module):
    assert ast.get_docstring(ast.parse(MODULES[module].read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=module_of)
def test_files_and_functions_stay_small(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


@pytest.mark.parametrize(
    ("program", "absent"),
    [
        ("from s2d_jax import load_model", {"torch", "transformers", "orbax", "tyro"}),
        ("import s2d_jax.progress.activity", {"jax", "rich", "numpy"}),
        ("from s2d_jax.model import selected", {"torch", "transformers"}),
        ("import s2d_jax.model.transformer", {"jax.experimental.pallas"}),
    ],
)
def test_an_import_loads_no_more_than_it_needs(program, absent):
    program = f"import sys; {program}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not absent & set(done.stdout.split())


def _depth(module: str, known: dict[str, int]) -> int:
    if module not in known:
        known[module] = 1 + max((_depth(name, known) for name in GRAPH[module]), default=0)
    return known[module]


def report() -> None:
    """Files of each wing, how deep imports go, and the arrows between wings."""
    arrows, known = set(), {}
    for package, lines in WINGS.items():
        names = [module for module in MODULES if wing_of(module)[0] == package]
        files = collections.Counter(wing_of(module)[1] for module in names)
        depth = max(_depth(module, known) for module in names if "." in module)
        between = {
            (wing_of(module)[1], wing_of(name)[1])
            for module in names
            for name in GRAPH[module]
            if wing_of(name)[0] == package and wing_of(module)[1] and wing_of(name)[1]
        }
        between = {(one, other) for one, other in between if one != other}
        arrows |= {(package, *arrow) for arrow in between}
        print(
            f"{package}: {len(names)} files, imports {depth} deep, {len(between)} arrows between wings"
        )
        for line in lines:
            print("   ", ", ".join(f"{wing} {files[wing]}" for wing in line.split()))
    print(f"arrows between modules: {sum(map(len, GRAPH.values()))}, between wings: {len(arrows)}")


if __name__ == "__main__":
    report()
