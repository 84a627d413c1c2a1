"""Compiles rounds for an H100 and for TPU chips that are not here, and writes what their compilers made of them.

    pip install 's2d-jax[compilers]'
    JAX_PLATFORMS=cpu python docs/checks/compiled_rounds.py --set shown --out docs/lab/programs.json

Prints one line of JSON for each round. The tests compile some of them again and compare: tests/decode/test_compiled_rounds.py.
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", choices=("quick", "shown", "whole", "all"), default="quick")
    parser.add_argument("--chip", choices=("h100", "v5p"), help="only rounds of this chip")
    parser.add_argument("--only", nargs="*", help="only rounds of these names")
    parser.add_argument(
        "--out",
        type=Path,
        help="a JSON file that takes the rows in, in place of those of the same names",
    )
    args = parser.parse_args()
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
            _keep(args.out, row)
    return 0


def _keep(file: Path, row: dict) -> None:
    """Takes a row into the file, which says which compilers it is from."""
    known = json.loads(file.read_text()) if file.exists() else {"rows": []}
    rows = {old["round"]: old for old in known["rows"]} | {row["round"]: row}
    versions = {name: metadata.version(name) for name in COMPILERS}
    text = json.dumps({"versions": versions, "rows": list(rows.values())}, indent=1)
    file.write_text(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
