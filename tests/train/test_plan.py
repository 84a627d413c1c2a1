"""What a training step needs is told before there are weights or chips."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest
from hf_tiny import expect_user_error
from jax.experimental.compilation_cache import compilation_cache
from tiny import tiny_config

from s2d_jax.compilers.topologies import topology_devices
from s2d_jax.formats.hf_config import config_to_hf
from s2d_jax.sharding import MeshConfig, make_mesh
from train.config.files import load_config
from train.plan.__main__ import draft_shape, main, make_plan

CONFIGS = Path(__file__).parents[2] / "configs"
PAPER = CONFIGS / "vicuna7b_soft.yaml"


@pytest.fixture(autouse=True)
def _settings_are_given_back():
    """`main` sets for its whole process what later tests do without, and JAX notes once whether programs are kept."""
    names = ("jax_platforms", "jax_enable_compilation_cache")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def run_yaml(tmp_path):
    """A run of a tiny model that is not here; its shape lies beside the config. JAX has begun with 8 devices."""
    assert len(jax.devices()) == 8
    shapes = tmp_path / "shapes"
    shapes.mkdir()
    shape = config_to_hf(tiny_config(num_heads=8, num_kv_heads=8, ffw_dim=64), "float32")
    (shapes / "tiny.json").write_text(json.dumps(shape))
    path = tmp_path / "run.yaml"
    path.write_text(
        """
model: {path: models/tiny, num_layers: 2, compute_dtype: float32}
draft: {exit_layers: [1, 2]}
data: {paths: [none.jsonl], max_length: 16}
train: {batch_size: 8, loss_chunk: 8}
"""
    )
    return path


def planned(run_yaml, tmp_path, *flags) -> dict:
    out = tmp_path / "plan.json"
    arguments = ["--config", str(run_yaml), "--json", str(out), *map(str, flags)]
    assert main(arguments) == 0
    return json.loads(out.read_text())


def test_a_plan_tells_bytes_and_collectives(run_yaml, tmp_path, capsys):
    one = planned(run_yaml, tmp_path, "--devices", 1)
    assert one["collectives"] == {}
    assert one["params"] > 0
    assert one["optimizer"] == 2 * one["params"] + 4  # two moments and a counter
    eight = planned(run_yaml, tmp_path, "--devices", 8, "--mesh.fsdp", 8)
    for name in ("params", "optimizer"):
        assert one[name] / 8 < eight[name] < one[name] / 7
    assert eight["batch"] == one["batch"] / 8 == 5 * 4 * 16
    assert eight["params"] + eight["optimizer"] + eight["batch"] <= eight["arguments"]
    assert eight["temporaries"] > 0
    assert "all-gather" in eight["collectives"]
    text = capsys.readouterr().out
    assert "run.yaml on 8 CPU devices: 8 rows of 16 tokens" in text
    assert " x all-gather" in text


@pytest.mark.exhaustive("a plan of another mesh tells its collectives always")
def test_copies_of_the_parameters_need_sums_of_gradients_only(run_yaml, tmp_path):
    plan = planned(run_yaml, tmp_path, "--devices", 8, "--mesh.data", 8)
    assert set(plan["collectives"]) == {"all-reduce"}
    assert plan["collectives"]["all-reduce"]["bytes"] >= plan["params"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--devices", "0"), "error: --devices 0 must be at least 1"),
        (("--devices", "500"), "--devices 500 exceeds the 8 that JAX began with; set JAX_NUM"),
        (("--devices", "1000000000"), "1000000000 devices are more than a CPU can stand in for"),
        (("--topology", "v5p:2x2x2", "--slices", "1000000"), "--slices 1000000 must be 1 to 1024"),
        (("--devices", "8", "--mesh.fsdp", "16", "--train.batch-size", "16"), "needs 16 devices"),
        (("--devices", "8", "--shape", "none.json"), "--shape none.json does not exist; give a mod"),
        (("--devices", "8", "--model.path", "models/other"), "models/other is not on this machine; give"),
        (("--devices", "8", "--model.num-layers", "5", "--draft.exit-layers", "5"), "exceeds the 4 la"),
        (("--devices", "8", "--mesh.fsdq", "8"), "--mesh.fsdq"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(run_yaml, capsys, flags, message):
    assert main(["--config", str(run_yaml), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_the_papers_recipe_needs_no_weights():
    shape = draft_shape(load_config(PAPER), PAPER, None)
    assert (shape.num_layers, shape.embed_dim, shape.vocab_size) == (12, 4096, 32_000)


@pytest.mark.usefixtures("compiled_anew")
@pytest.mark.exhaustive("minutes each; smaller steps compile for chips in every run")
@pytest.mark.parametrize(
    ("topology", "slices", "mesh"),
    [
        ("v5p:2x2x2", 1, MeshConfig(fsdp=8)),
        ("v5p:2x2x2", 2, MeshConfig(data=2, fsdp=8)),
    ],
    ids=["8 chips", "two slices of 8"],
)
def test_the_papers_recipe_compiles_for_tpus(topology, slices, mesh):
    """Ahead of time: no weights, no TPU. Minutes each."""
    pytest.importorskip("libtpu", reason="install jax[tpu] to compile for TPU topologies")
    config = load_config(PAPER)
    plan = make_plan(
        config,
        draft_shape(config, PAPER, None),
        make_mesh(mesh, topology_devices(topology, slices)),
    )
    print(topology, slices, plan)
    parameters = 12 * (4 * 4096**2 + 3 * 4096 * 11_008) + 2 * 32_000 * 4096
    chips = mesh.fsdp * mesh.tensor
    assert plan.params == pytest.approx(4 * parameters / chips, rel=0.001)
    assert plan.optimizer == pytest.approx(2 * plan.params, rel=0.001)
    assert plan.total < 95e9  # of a v5p chip
    assert plan.collectives["all-gather"].count > 0


def test_a_topology_that_libtpu_does_not_know_is_named():
    pytest.importorskip("libtpu", reason="install jax[tpu] to compile for TPU topologies")
    with expect_user_error("--topology v5p:3x1x7 is not known to libtpu"):
        topology_devices("v5p:3x1x7")
