"""Compiles rounds for an H100 and for TPU chips that are not here, and writes what their compilers made of them.

    pip install 's2d-jax[compilers]'
    JAX_PLATFORMS=cpu python docs/checks/compiled_rounds.py --set shown --out docs/lab/programs.json

Prints one line of JSON for each round. The tests compile some of them again and compare: tests/decode/test_compiled_rounds.py.
`--tables docs/lab/programs.md` writes the tables between the page's marks from docs/lab/programs.json; nothing is compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMPILERS = ("jax", "jax-cuda12-pjrt", "libtpu")
RECORDED = ROOT / "docs" / "lab" / "programs.json"
_COLUMNS = {
    "loops": "loops",
    "conditions": "conditions",
    "kernels": "kernels",
    "command buffers": "command buffers",
    "cache copies in a round": "cache copies, round",
    "cache copies in a call": "call",
    "temporaries, MB": "temporaries, MB",
    "aliased, MB": "aliased, MB",
}
_ON_MESHES = {
    "products, GFLOP": "products, GFLOP",
    "arguments, MB": "arguments, MB",
    "caches, MB": "of them caches",
    "temporaries, MB": "temporaries, MB",
    "loops": "loops",
    "kernels": "kernels",
    "cache copies in a round": "cache copies, round",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--set", choices=("quick", "shown", "meshes", "whole", "all"), default="quick"
    )
    parser.add_argument("--chip", choices=("h100", "v5p"), help="only rounds of this chip")
    parser.add_argument("--only", nargs="*", help="only rounds of these names")
    parser.add_argument(
        "--out",
        type=Path,
        help="a JSON file that takes the rows in, in place of those of the same names",
    )
    parser.add_argument("--tables", type=Path, help="write the tables of this page anew, and end")
    args = parser.parse_args()
    if args.tables:
        args.tables.write_text(
            with_tables(args.tables.read_text(), json.loads(RECORDED.read_text()))
        )
        return 0
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs, so no accelerator is taken
    import jax

    # A cached program for chips that this machine lacks cannot be read back.
    jax.config.update("jax_enable_compilation_cache", False)
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    import compiled_rounds

    for round in getattr(compiled_rounds, args.set.upper()):
        if args.chip not in (None, round.chip) or (args.only and round.name not in args.only):
            continue
        started = time.perf_counter()
        row = compiled_rounds.row_of(round)
        print(json.dumps(row), flush=True)
        print(f"{round.name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        if args.out:
            _keep(args.out, row, "meshes" if args.set == "meshes" else "rows")
    return 0


def _keep(file: Path, row: dict, part: str) -> None:
    """Takes a row into a part of the file, which says which compilers it is from."""
    known = json.loads(file.read_text()) if file.exists() else {}
    rows = {old["round"]: old for old in known.get(part, ())} | {row["round"]: row}
    versions = {name: metadata.version(name) for name in COMPILERS}
    text = json.dumps(known | {"versions": versions, part: list(rows.values())}, indent=1)
    file.write_text(text + "\n")


def with_tables(page: str, recorded: dict) -> str:
    """The page with its tables made from what was recorded."""
    tables = {"rounds": _rounds, "meshes": _meshes, "reads": _reads, "beyond": _beyond}
    for mark, lines in ((mark, table(recorded)) for mark, table in tables.items()):
        begin, end = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->\n"
        head, rest = page.split(begin)
        page = head + begin + "\n" + "".join(lines) + "\n" + end + rest.split(end)[1]
    return page


def _rounds(recorded: dict) -> list[str]:
    before = {row["round"]: row for row in recorded.get("before", [])}
    lines = [_line(["round", *_COLUMNS.values(), "collectives"])]
    lines.append(_line(["---", *["---:"] * len(_COLUMNS), "---"]))
    for row in recorded["rows"]:
        old = before.get(row["round"], {})
        cells = [_change(old.get(name), row[name]) for name in _COLUMNS]
        lines.append(_line([row["round"], *cells, _sent(row["collectives"])]))
    return lines


def _change(before: float | None, after: float) -> str:
    return f"{after:,}" if before in (None, after) else f"{before:,} → {after:,}"


def _reads(recorded: dict) -> list[str]:
    lines = [_line(["round", "tokens leave at", "read, MB", "least, MB", "ratio"])]
    lines.append(_line(["---", "---:", "---:", "---:", "---:"]))
    for row in recorded["rows"]:
        for exit, read in row.get("reads", {}).items():
            least = read["least, MB"]
            figures = f"{read['MB']:,.0f}", f"{least:,.0f}", f"{read['MB'] / least:.3f}"
            lines.append(_line([row["round"], "-" if exit == "0" else exit, *figures]))
    return lines


def _meshes(recorded: dict) -> list[str]:
    names = ["over data", "over tensor", *_ON_MESHES.values(), "read over least"]
    lines = [_line(["round", *names])]
    lines.append(_line(["---", "---", "---", *["---:"] * len(_ON_MESHES), "---"]))
    for row in recorded["meshes"]:
        axes = (_sent(row["collectives by axis"][axis]) for axis in ("data", "tensor"))
        cells = [f"{row[name]:,}" for name in _ON_MESHES]
        ratios = [f"{r['MB'] / r['least, MB']:.3f}" for r in row.get("reads", {}).values()]
        lines.append(_line([row["round"], *axes, *cells, ", ".join(ratios) or "-"]))
    return lines


def _sent(collectives: dict[str, int]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in collectives.items()) or "-"


def _beyond(recorded: dict) -> list[str]:
    lines = [
        _line(["round", "cache copies, round", "read over least", "collectives"]),
        _line(["---", "---:", "---", "---"]),
    ]
    for name, found in recorded["beyond"].items():
        ratios = ", ".join(map(str, found.get("read over least", ()))) or "-"
        copies, sent = found.get("cache copies in a round", 0), found.get("collectives", {})
        lines.append(_line([name, str(copies), ratios, _sent(sent)]))
    return lines


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    sys.exit(main())
