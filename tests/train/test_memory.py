"""The memory table: its figures are the compiler's, for the steps that training runs."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import tiny_config, tiny_params

from s2d_jax.formats.hf_config import config_to_hf
from s2d_jax.model.params import abstract_params
from s2d_jax.sharding import MeshConfig, make_mesh
from train.config.files import load_config
from train.medusa import MedusaConfig, MedusaTrainer
from train.memory import __main__ as memory
from train.memory.__main__ import Args, main, plan, run
from train.plan.step_memory import StepToCompile, bytes_per_device, measure_step

ROOT = Path(__file__).parents[2]
MESH = MeshConfig(data=2, fsdp=2, tensor=2)
TINY = {"batch_size": 16, "length": 8, "accumulate": 2, "heads": 2, "loss_chunk": 4}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Directories with a config.json: a shallow and a deep model of one vocabulary."""
    directory, found = tmp_path_factory.mktemp("models"), {}
    for name, layers, width in (("small", 2, 32), ("large", 3, 64)):
        config = tiny_config(num_layers=layers, embed_dim=width)
        (directory / name).mkdir()
        text = json.dumps(config_to_hf(config, "float32"))
        (directory / name / "config.json").write_text(text)
        found[name] = str(directory / name)
    return found


def arguments(models: dict[str, str], *targets: str, **changes) -> Args:
    values = {"draft": models["small"], "exit_layers": (1, 2), "topology": "cpu", "mesh": MESH}
    return Args(target=tuple(models[name] for name in targets), **{**values, **TINY, **changes})


@pytest.fixture(scope="module")
def rows(models):
    return run(arguments(models, "small", "large"))


@pytest.mark.exhaustive("the figures of the table are compared with those of the compiler")
def test_the_drafts_row_is_the_same_whatever_the_target(models, rows):
    alone = run(arguments(models, "large"))
    without_time = [dataclasses.replace(row[0], compile_seconds=0.0) for row in (rows, alone)]
    assert without_time[0] == without_time[1]
    assert [row.target for row in rows] == [None, models["small"], models["large"]]
    assert rows[2].frozen > rows[1].frozen > rows[0].frozen == 0
    assert rows[2].peak > rows[1].peak


def test_the_tables_figures_are_the_compilers(models, rows):
    steps = plan(arguments(models, "small", "large"), make_mesh(MESH))
    for step, row in zip(steps, rows, strict=True):
        found = step.compile().memory_analysis()
        assert row.arguments == found.argument_size_in_bytes
        assert row.outputs == found.output_size_in_bytes
        assert row.aliased == found.alias_size_in_bytes
        assert row.temporaries == found.temp_size_in_bytes > 0
        kept = row.arguments + row.outputs - row.aliased
        assert row.peak == kept + row.temporaries + found.generated_code_size_in_bytes
        batch = 5 * 4 * TINY["batch_size"] * TINY["length"] // 4  # rows over data and fsdp
        state = row.frozen + row.trained + row.optimizer
        assert state + batch <= row.arguments <= state + batch + 8  # and one or two scalars
        assert row.aliased == row.trained + row.optimizer  # the state is updated in place


def test_bytes_of_the_state_are_those_of_a_real_one(models, rows):
    config = memory.shape_of(models["large"])
    trainer = MedusaTrainer(MedusaConfig(num_heads=2, batch_size=16), config, make_mesh(MESH))
    params = tiny_params(config)
    trunk, state = trainer.place_trunk(params), trainer.init_state(params)

    def on_first_device(tree) -> int:
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    assert rows[2].frozen == on_first_device(trunk) == bytes_per_device(trunk)
    assert rows[2].trained == on_first_device(state.heads)
    assert rows[2].optimizer == on_first_device(state.opt_state)


def test_defaults_are_the_papers_recipe():
    recipe = load_config(ROOT / "configs" / "vicuna7b_soft.yaml")
    args = Args()
    assert (args.batch_size, args.length) == (recipe.train.batch_size, recipe.data.max_length)
    assert args.exit_layers == recipe.draft.exit_layers
    assert (args.compute_dtype, args.remat) == (recipe.model.compute_dtype, recipe.model.remat)
    assert (args.mesh, args.loss_chunk) == (recipe.mesh, recipe.train.loss_chunk)
    assert args.target == ()
    assert [*memory.MODELS] == ["vicuna-7b", "vicuna-13b", "llama-2-70b"]


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("vicuna-7b", 6_738_415_616),
        ("vicuna-13b", 13_015_864_320),
        ("llama-2-70b", 68_976_648_192),
    ],
)
def test_the_known_models_have_the_published_number_of_parameters(name, published):
    config = memory.shape_of(name)

    def count(layers: int) -> int:
        params = abstract_params(dataclasses.replace(config, num_layers=layers))
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))

    assert count(1) + (config.num_layers - 1) * (count(2) - count(1)) == published


@pytest.mark.parametrize(
    ("said", "peak"),
    [
        ("Ran out of memory in memory space hbm. Used 215.50G of 95.74G hbm.", 215.5),
        ("the total memory required for HLO temporaries (161.54G) exceeds available HBM", 161.54),
        ("Attempting to reserve more than there is.", None),
    ],
)
def test_a_step_that_does_not_fit_is_a_row(said, peak):
    """As libtpu 0.0.42 says it, in units of 2**30 bytes."""

    def compile():
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {said}")

    row = measure_step(StepToCompile("Medusa", "huge", 1, (), (), (), compile), devices=8)
    assert row.peak == (peak and int(peak * 2**30))
    assert row.temporaries is None
    assert not row.fits(95e9)


def test_a_compiler_that_fails_otherwise_is_heard():
    def compile():
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    step = StepToCompile("Medusa", "any", 1, (), (), (), compile)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        measure_step(step, devices=8)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target", "vicuna-8b"], "model 'vicuna-8b' is unknown; give vicuna-7b"),
        (["--exit-layers", "6", "40"], "exit_layers=(6, 40) exceeds num_layers=32"),
        (["--accumulate", "3"], "train.batch_size=128 does not divide into"),
        (["--accumulate", "32"], "rows do not divide over"),
        (["--heads", "0"], "num_heads=0 must be 1 to 64"),
        (["--mesh.fsdp", "16"], "needs 16 devices, 8 are present"),
        (["--mesh.fsdp", "512000"], "is 512000 devices; a mesh has 65536 at most"),
        (["--mesh.fsdp", "1024", "--batch-size", "16384"], "more than a CPU can stand in for"),
        (["--heads", "1000000"], "num_heads=1000000 must be 1 to 64"),
        (
            ["--batch-size", "1000000000000000", "--accumulate", "1"],
            "tokens a step; at most 2147483647",
        ),
        (["--length", "1000000000000"], "tokens a step; at most 2147483647"),
        (["--topology", "moon:2x2"], "--topology moon:2x2"),
        (["--compute-dtype", "float8"], "--compute-dtype"),
        (["--lenght", "7"], "did you mean --length?"),
    ],
    ids=lambda value: value[0].lstrip("-") if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(flags, message, capsys):
    assert main([*flags, *([] if "--topology" in flags else ["--topology", "cpu"])]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_the_command_prints_a_table_and_writes_it(models, tmp_path):
    out = tmp_path / "report"
    flags = [
        *("--topology", "cpu", "--draft", models["small"], "--exit-layers", "1", "2"),
        *("--target", models["small"], "--mesh.fsdp", "4", "--batch-size", "8", "--length", "8"),
        *("--accumulate", "2", "--heads", "2", "--compute-dtype", "float32", "--out", str(out)),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "train.memory", *flags],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    assert any("SoFT draft" in line and "any" in line for line in lines)
    written = json.loads((out / "memory.json").read_text())
    soft, medusa = written["rows"]
    assert soft["devices"] == medusa["devices"] == 4
    assert medusa["frozen"] > 0
    assert written["options"]["topology"] == "cpu"
    markdown = (out / "memory.md").read_text()
    assert f"| Medusa | small | {medusa['frozen'] / 1e9:.2f} |" in markdown
    assert "CPU compiler" in markdown
    assert "92,744" not in markdown  # the paper's figure is of another draft


def test_a_tpu_topology_is_compiled_for(models, tmp_path):
    pytest.importorskip("libtpu", reason="install jax[tpu] to compile for TPU topologies")
    flags = ["--draft", models["small"], "--exit-layers", "1", "2", "--target", models["small"]]
    flags += ["--mesh.fsdp", "8", "--batch-size", "16", "--accumulate", "2", "--length", "128"]
    done = subprocess.run(
        [sys.executable, "-m", "train.memory", *flags, "--out", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "memory.json").read_text())
    assert written["options"]["topology"] == "v5p:2x2x2"
    assert all(row["temporaries"] > 0 for row in written["rows"])
