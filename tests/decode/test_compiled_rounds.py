"""Rounds compiled for an H100 and for TPU v5p chips that are not here: what their compilers make of them."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from compiled_rounds import ALL, MESHES, QUICK, WHOLE, Round

ROOT = Path(__file__).parents[2]
RECORDED = json.loads((ROOT / "docs" / "lab" / "programs.json").read_text())
MODULES = {"h100": "jax_plugins.xla_cuda12", "v5p": "libtpu"}
PACKAGES = {"h100": "jax-cuda12-pjrt", "v5p": "libtpu"}
CHIPS = [pytest.param(c, marks=pytest.mark.xdist_group(f"compilers-{c}")) for c in PACKAGES]


def _compiled(chip: str, which: str) -> dict[str, dict]:
    """The rows of a set of rounds by name, compiled in a process of their own: the compilers' flags are read once."""
    try:
        found = importlib.util.find_spec(MODULES[chip])
    except ModuleNotFoundError:
        found = None
    if found is None:
        pytest.skip(f"install s2d-jax[compilers] to compile for {chip}")
    command = [sys.executable, "docs/checks/compiled_rounds.py", "--set", which, "--chip", chip]
    clean = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        command, cwd=ROOT, env=clean | paths, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {row["round"]: row for row in map(json.loads, done.stdout.splitlines())}


def _check(round: Round, row: dict) -> None:
    """What must hold of every round, whichever version compiled it."""
    beyond = RECORDED["beyond"].get(round.name, {})  # the page says which and why
    assert row["cache copies in a round"] == beyond.get("cache copies in a round", 0), row
    assert row["host transfers"] == 0, row
    boundaries = len(round.left_at) - 1
    # The decoding loop, the drafting loop, at most two more, and two for each exit boundary, however deep the models are.
    assert row["loops"] <= 4 + 2 * boundaries, row
    assert row["cache copies in a call"] == beyond.get("cache copies in a call", 0), row
    if round.chip == "h100":
        assert row["command buffers"] == 1 or round.tensor > 1, row
    # The blocks' sums, two in a layer and one of the embeddings, and one gathering of the logits: none inside of a filter.
    # An int8 table has scales, which are looked up as well.
    tables = (1, 2) if round.weight_format == "int8" else (1,)
    split = [{"all-gather": 1, "all-reduce": 2 * round.layers + count} for count in tables]
    # The logits of one row may also be summed, with zeros where another device has them.
    split += [{"all-reduce": 2 * round.layers + count + 1} for count in tables]
    usual = split if round.tensor > 1 else [{}]
    assert row["collectives"] in ([beyond["collectives"]] if "collectives" in beyond else usual), (
        row
    )
    # And no group of devices waits for another.
    assert row["collectives by axis"] == {"data": {}, "tensor": row["collectives"]}, row
    # Beside weights and caches there are activations, which weigh twice as much beside int8, and the passes of filters; and a
    # TPU fetches weights of deeper layers ahead, before it is known whether they are needed.
    most = 1.2 if round.sampled or round.weight_format == "int8" else 1.1
    ratios = [read["MB"] / read["least, MB"] for read in row.get("reads", {}).values()]
    if "read over least" in beyond:
        assert ratios == pytest.approx(beyond["read over least"], abs=0.01), row
    else:
        assert all(1 <= ratio <= most for ratio in ratios), row


def _check_recorded(chip: str, rows: dict[str, dict]) -> None:
    """The table in the documentation is what the compilers of its versions say."""
    known = {row["round"]: row for row in (*RECORDED["rows"], *RECORDED["meshes"])}
    for name in ("jax", PACKAGES[chip]):
        if (here := metadata.version(name)) != (there := RECORDED["versions"][name]):
            pytest.skip(f"{name} is {here}; the table was made with {there}")
    for name in rows.keys() & known.keys():
        # Older rows have fewer figures.
        found = {figure: rows[name][figure] for figure in known[name]}
        assert found == known[name], "run docs/checks/compiled_rounds.py --set shown --out ..."


def _compile_and_check(chip: str, which: str, rounds: list[Round]) -> None:
    rows = _compiled(chip, which)
    for round in (round for round in rounds if round.chip == chip):
        _check(round, rows[round.name])
    _check_recorded(chip, rows)


@pytest.mark.parametrize("chip", CHIPS)
def test_rounds_are_what_the_table_says(chip):
    _compile_and_check(chip, "quick", QUICK)


@pytest.mark.exhaustive("each takes a minute to compile")
@pytest.mark.parametrize("chip", CHIPS)
def test_all_of_llama2_7b_with_a_draft_of_twelve_layers(chip):
    _compile_and_check(chip, "whole", WHOLE)


@pytest.mark.exhaustive(
    "a dozen rounds for each chip; those that always run have both kinds of groups"
)
@pytest.mark.parametrize("chip", CHIPS)
def test_all_rounds_on_a_mesh(chip):
    _compile_and_check(chip, "meshes", MESHES)


@pytest.mark.exhaustive("a hundred rounds for each chip; the rest has each value of every axis")
@pytest.mark.parametrize("chip", CHIPS)
def test_the_whole_matrix(chip):
    _compile_and_check(chip, "all", ALL)


ON_MESHES = {row["round"]: row for row in RECORDED["meshes"]}


@pytest.mark.parametrize("round", MESHES, ids=lambda round: round.name)
def test_what_was_recorded_of_rounds_on_a_mesh(round):
    _check(round, ON_MESHES[round.name])


def test_every_round_on_a_mesh_was_recorded():
    assert [*ON_MESHES] == [round.name for round in MESHES]


EIGHTHS = ("products, GFLOP", "caches, MB")
GREEDY = [round for round in MESHES if not round.sampled]


@pytest.mark.parametrize("round", [r for r in GREEDY if r.data == 8], ids=lambda round: round.name)
def test_with_a_row_for_each_device_it_computes_and_keeps_an_eighth(round):
    whole = dataclasses.replace(round, devices=1, data=1)
    row, whole, one_row = (
        ON_MESHES[r.name] for r in (round, whole, dataclasses.replace(whole, batch=1))
    )
    for figure in EIGHTHS:
        assert row[figure] * 8 == pytest.approx(whole[figure], rel=0.005)
        assert row[figure] == pytest.approx(one_row[figure], rel=0.005)
    # Every device has the whole target and draft.
    assert row["arguments, MB"] == pytest.approx(one_row["arguments, MB"], rel=0.001)


@pytest.mark.parametrize(
    "round",
    [r for r in GREEDY if r.data == 2 and dataclasses.replace(r, data=1) in GREEDY],
    ids=lambda round: round.name,
)
def test_a_group_shares_the_target_and_each_of_its_devices_drafts_for_all_of_its_rows(round):
    row, eight_groups, one_group = (
        ON_MESHES[dataclasses.replace(round, data=data).name] for data in (2, 8, 1)
    )
    for figure in EIGHTHS:
        # Of the target an eighth everywhere; of the draft an eighth with eight groups, and all of it with one.
        draft = (one_group[figure] - eight_groups[figure]) / (1 - 1 / 8)
        expected = eight_groups[figure] + draft * (1 / 2 - 1 / 8)
        assert row[figure] == pytest.approx(expected, rel=0.005)
    # What is sampled has the products of a greedy round.
    if sampled := ON_MESHES.get(dataclasses.replace(round, sampled=True).name):
        assert sampled["products, GFLOP"] == row["products, GFLOP"]


def test_the_page_shows_what_was_recorded():
    file = ROOT / "docs" / "checks" / "compiled_rounds.py"
    spec = importlib.util.spec_from_file_location("compiled_rounds_script", file)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = (ROOT / "docs" / "lab" / "programs.md").read_text("utf-8")
    assert script.with_tables(page, RECORDED) == page
