"""The programs of training, as compilers make them: for chips that are not here, and over meshes of fake devices."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from chips_elsewhere import chips
from tiny import tiny_config

from s2d_jax import backends
from s2d_jax.sharding import MeshConfig, make_mesh
from s2d_jax.weights.checkpoints import placed
from train.config.files import load_config
from train.config.sections import Config, DataSection, DraftSection, ModelSection, TrainSection
from train.plan.__main__ import draft_shape, make_plan
from train.plan.step_work import work_of_step
from train.step.for_mesh import for_mesh
from train.step.trainer import Trainer

ROOT = Path(__file__).parents[2]
ONE_DEVICE = MeshConfig()
PAPER = ROOT / "configs" / "vicuna7b_soft.yaml"
MODEL = tiny_config(num_layers=2, num_heads=8, num_kv_heads=8, ffw_dim=64)
# XLA prints this where it copies an array to every device, because it finds no better way from one sharding to another.
COPIED_TO_ALL = "Involuntary full rematerialization"
MESHES = ((8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 4, 1), (4, 2, 1), (4, 1, 2), (1, 4, 2), (1, 2, 4))
# Compiles one step for each mesh; in a process of its own, because the warning is written by C++ past Python's stderr.
COMPILE = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
import test_train_programs as programs
for mesh in sys.argv[1:]:
    programs.planned(programs.MeshConfig(*map(int, mesh.split(","))), jax.devices("cpu"))
"""


def config_of(mesh: MeshConfig = ONE_DEVICE, *, length: int = 32, rows: int = 8, **train) -> Config:
    return Config(
        model=ModelSection(path="tiny"),
        data=DataSection(paths=("none",), max_length=length),
        draft=DraftSection(exit_layers=(1, 2)),
        mesh=mesh,
        train=TrainSection(batch_size=rows, loss_chunk=8, **train),
    )


def planned(mesh: MeshConfig, devices, **settings):
    return make_plan(config_of(mesh, **settings), MODEL, make_mesh(mesh, devices))


def stderr_of_compiling(meshes, source: str = COMPILE) -> str:
    """What a process that compiles the steps writes to its descriptor 2, C++ included."""
    folders = (ROOT, ROOT / "tests" / "helpers", Path(__file__).parent)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "0",
    }
    words = [",".join(map(str, mesh)) for mesh in meshes]
    done = subprocess.run(
        [sys.executable, "-c", source, *words],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr


def test_no_states_are_copied_to_every_device():
    assert COPIED_TO_ALL not in stderr_of_compiling([(2, 2, 2)])


@pytest.mark.exhaustive("eight more meshes; all three axes at once are compiled by the test above")
def test_no_mesh_copies_states_to_every_device():
    assert COPIED_TO_ALL not in stderr_of_compiling(MESHES)


@pytest.mark.exhaustive("shows that the tests above can fail")
def test_states_in_one_move_are_copied_and_the_warning_is_seen():
    """The table's features go to rows over `data` and `fsdp` in one move, as `over_rows` alone would have it."""
    one_move = """
import s2d_jax.model.transformer as transformer
transformer.looked_up_over_rows = transformer.over_rows
"""
    assert COPIED_TO_ALL in stderr_of_compiling([(2, 2, 2)], one_move + COMPILE)


def test_chunks_of_the_loss_send_nothing():
    """Heads are gathered before the first chunk, and their gradient is added up after the last."""
    sent = planned(MeshConfig(data=2, fsdp=4), jax.devices("cpu")).collectives
    assert sent["all-gather"].count > 0
    assert all(found.in_loops == 0 for found in sent.values()), sent


ALL_CHIPS = pytest.mark.exhaustive("one GPU is compiled for always; more chips take minutes")


@pytest.mark.usefixtures("compiled_anew")
@pytest.mark.parametrize(
    ("topology", "mesh"),
    [
        ("h100:1", MeshConfig()),
        pytest.param("h100:8", MeshConfig(fsdp=8), marks=ALL_CHIPS),
        pytest.param("v5p:2x2x2", MeshConfig(fsdp=8), marks=ALL_CHIPS),
        pytest.param("v5p:2x2x2", MeshConfig(2, 2, 2), marks=ALL_CHIPS),
    ],
)
def test_a_step_compiles_for_chips(topology, mesh):
    plan = planned(mesh, chips(topology))
    assert plan.devices == mesh.data * mesh.fsdp * mesh.tensor
    assert plan.temporaries > 0
    assert bool(plan.collectives) == (plan.devices > 1)


@pytest.mark.usefixtures("compiled_anew")
@pytest.mark.exhaustive("twelve layers of 7B with rows of 8192 tokens compile for minutes")
@pytest.mark.parametrize("topology", ["v5p:2x2x2", "h100:8"])
def test_rows_of_8192_tokens_compile(topology):
    config = load_config(PAPER)
    train = dataclasses.replace(config.train, batch_size=8)
    config = dataclasses.replace(
        config, train=train, data=dataclasses.replace(config.data, max_length=8192)
    )
    mesh = make_mesh(config.mesh, chips(topology))
    plan = make_plan(config, draft_shape(config, PAPER, None), mesh)
    print(topology, plan)
    assert plan.batch == 5 * 4 * 8192


def test_a_step_is_traced_in_the_forms_of_its_chips(monkeypatch):
    """A trainer on one machine compiles for another's chips, so the process's own backend must not choose."""
    asked = []
    monkeypatch.setattr("train.step.for_mesh.platform_of", lambda mesh: "tpu")
    monkeypatch.setattr(
        Trainer, "_train_step", lambda self, *_: asked.append(backends.forms()) or (None, None)
    )
    trainer = Trainer(config_of(), MODEL, make_mesh(MeshConfig()))
    jax.eval_shape(for_mesh(trainer._train_step, trainer.mesh))
    assert asked == [backends.TPU]


def test_work_is_counted_from_shapes():
    """By hand, for one layer's matrices, two exits of one head, and attention over whole rows."""
    config = config_of(length=16, rows=4)
    trainer = Trainer(config, MODEL, make_mesh(MeshConfig()))
    params = placed(trainer.abstract_state(), trainer.state_sharding).params
    D, N, H, F, V, tokens = 32, 8, MODEL.head_dim, 64, MODEL.vocab_size, 16 * 4
    weights = 2 * (4 * D * N * H + 3 * D * F)
    scores = 2 * 4 * 16 * N * H
    heads = 2 * V * D
    # Forwards, backwards twice, and the blocks once more.
    expected = tokens * (2 * weights * 4 + scores * 4 + 2 * heads * 3)
    work = work_of_step(config, MODEL, params, trainer.mesh)
    assert work.flops == expected
    halved = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=8))
    assert work_of_step(halved, MODEL, params, trainer.mesh).flops == 2 * expected
