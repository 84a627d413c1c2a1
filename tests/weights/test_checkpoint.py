"""Checkpoints: complete or absent, restored onto any mesh, and clear about what is missing."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_tiny import expect_user_error
from tiny import tiny_config, tiny_params, tiny_tokenizer

from s2d_jax.config.draft import DraftConfig
from s2d_jax.config.model import RopeScaling
from s2d_jax.errors import UserError
from s2d_jax.model.params import abstract_params, logical_axes
from s2d_jax.sharding import MeshConfig, make_mesh, params_sharding
from s2d_jax.weights.checkpoints import Checkpoints, placed
from s2d_jax.weights.runs import CHECKPOINTS, load_run, read_run, write_run

CONFIG = tiny_config(
    num_layers=2,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 128),
    eos_token_ids=(1, 2),
    tie_embeddings=True,
)


@pytest.fixture
def run_dir(tmp_path):
    """A run with checkpoints 3, 5 and 9, of which two are kept."""
    write_run(tmp_path / "run", CONFIG, DraftConfig((1, 2), (0.7, 0.0)), tiny_tokenizer(64))
    with contextlib.closing(Checkpoints(tmp_path / "run" / CHECKPOINTS, keep=2)) as checkpoints:
        for step in (3, 5, 9):
            params = jax.tree.map(lambda x: x * jnp.float32(step), tiny_params(CONFIG))  # noqa: B023
            checkpoints.save(step, {"elapsed_seconds": step / 2}, params=params)
        checkpoints.wait()
    return tmp_path / "run"


def test_the_description_of_a_run_reads_back_equal(run_dir):
    assert read_run(run_dir) == (CONFIG, DraftConfig((1, 2), (0.7, 0.0)))


def test_the_newest_checkpoints_are_kept_with_their_metadata(run_dir):
    with contextlib.closing(Checkpoints(run_dir / CHECKPOINTS)) as checkpoints:
        assert checkpoints.steps == [5, 9]
        assert checkpoints.metadata(5) == {"elapsed_seconds": 2.5}


@pytest.mark.parametrize("step", [5, 9, None])
def test_a_draft_is_what_was_saved(run_dir, step):
    draft = load_run(run_dir, step)
    expected = jax.tree.map(lambda x: x * jnp.float32(step or 9), tiny_params(CONFIG))
    jax.tree.map(np.testing.assert_array_equal, draft.params, expected)
    assert draft.config == CONFIG
    assert draft.draft_config == DraftConfig((1, 2), (0.7, 0.0))
    assert draft.source == f"{run_dir} step {step or 9}"


def test_restores_onto_a_mesh(run_dir):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    draft = load_run(run_dir, mesh=mesh)
    expected = params_sharding(CONFIG, logical_axes(CONFIG), mesh)
    assert jax.tree.map(lambda x: x.sharding, draft.params) == expected
    jax.tree.map(np.testing.assert_array_equal, draft.params, load_run(run_dir).params)


def test_a_killed_save_is_not_listed_and_is_cleaned_up(run_dir):
    remains = run_dir / CHECKPOINTS / "12.orbax-checkpoint-tmp-1"
    remains.mkdir()
    (remains / "half").write_text("")
    assert load_run(run_dir).source.endswith("step 9")
    with contextlib.closing(Checkpoints(run_dir / CHECKPOINTS, keep=2)) as checkpoints:
        assert checkpoints.steps == [5, 9]
        # Orbax removes the remains in the background, and waits for that before it writes anew.
        checkpoints.save(15, {}, params=tiny_params(CONFIG))
        checkpoints.wait()
        assert checkpoints.steps == [9, 15]
    assert not remains.exists()


# What TensorStore raises on a full disk; Orbax passes it on.
TENSORSTORE_FULL = ValueError(
    'RESOURCE_EXHAUSTED: Failed writing: "/run/checkpoints/3.orbax-checkpoint-tmp/params.orbax-checkpoint-tmp/d/86c4": '
    "Failed to write 6864 bytes to file 24: No space left on device [os_error_code='28']"
)


def raised_from(cause: Exception) -> RuntimeError:
    error = RuntimeError("save failed")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        raised_from(OSError(28, "No space left on device")),
        TENSORSTORE_FULL,
        raised_from(TENSORSTORE_FULL),
    ],
    ids=["of Python", "of Python, wrapped", "of TensorStore", "of TensorStore, wrapped"],
)
def test_a_full_disk_in_the_background_is_told_in_one_line(run_dir, monkeypatch, error):
    checkpoints = Checkpoints(run_dir / CHECKPOINTS, keep=2)

    def full_disk():
        (run_dir / CHECKPOINTS / "12.orbax-checkpoint-tmp").mkdir()
        raise error

    with contextlib.closing(checkpoints), monkeypatch.context() as patch:
        patch.setattr(checkpoints._checkpointer, "wait", full_disk)
        message = (
            r"No space left on device; checkpoints \[5, 9\] are intact; free some space and resume"
        )
        with expect_user_error(message):
            checkpoints.wait()
    assert sorted(path.name for path in (run_dir / CHECKPOINTS).iterdir()) == ["5", "9"]


def test_an_error_that_is_not_the_disks_is_not_hidden(run_dir, monkeypatch):
    checkpoints = Checkpoints(run_dir / CHECKPOINTS, keep=2)

    def fault():
        raise ValueError("a fault of the program")

    with contextlib.closing(checkpoints), monkeypatch.context() as patch:
        patch.setattr(checkpoints._checkpointer, "wait", fault)
        with pytest.raises(ValueError, match="a fault of the program"):
            checkpoints.wait()


def array_files(run_dir, step):
    """The files that hold the arrays, largest first."""
    files = [p for p in (run_dir / CHECKPOINTS / str(step) / "params").rglob("d/*") if p.is_file()]
    return sorted(files, key=lambda path: -path.stat().st_size)


def test_a_truncated_checkpoint_is_named_with_the_remedy(run_dir, caplog):
    for file in array_files(run_dir, 9):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with expect_user_error(
        r"checkpoint 9 in .*checkpoints is damaged \(.+\); complete files of this run are expected; "
        r"take step 5 \(--step 5\), or delete .*checkpoints/9 to go on from there"
    ):
        load_run(run_dir)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert load_run(run_dir, 5).source.endswith("step 5")
    shutil.rmtree(run_dir / CHECKPOINTS / "5")
    with expect_user_error("there is no other, so train again in another directory"):
        load_run(run_dir)


def test_what_is_missing_is_named(run_dir, tmp_path):
    with pytest.raises(UserError, match=r"step=4 is not in .*checkpoints; it holds 5, 9"):
        load_run(run_dir, 4)
    with pytest.raises(
        UserError, match=r"nowhere holds no readable model_config.json; give the dir"
    ):
        load_run(tmp_path / "nowhere")
    write_run(tmp_path / "new", CONFIG, DraftConfig((2,)), tiny_tokenizer(64))
    with pytest.raises(UserError, match=r"checkpoints holds no checkpoint; train first"):
        load_run(tmp_path / "new")
    assert not (tmp_path / "new" / CHECKPOINTS).exists()


def test_optimizer_state_survives_with_its_types(tmp_path):
    import optax

    params = tiny_params(dataclasses.replace(CONFIG, rope_scaling=None))
    state = optax.adam(1e-3).init(params)
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: one_device, state)
    with contextlib.closing(Checkpoints(tmp_path / "c", keep=1)) as checkpoints:
        checkpoints.save(1, {}, params=params, opt_state=state)
        checkpoints.wait()
        abstract = jax.eval_shape(lambda: state)
        restored = checkpoints.restore(1, opt_state=placed(abstract, shardings))["opt_state"]
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert abstract_params(CONFIG).keys() == params.keys()


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path):
    directory = tmp_path / "run" / CHECKPOINTS
    write_run(tmp_path / "run", CONFIG, DraftConfig((1, 2), (0.7, 0.0)), tiny_tokenizer(64))
    with contextlib.closing(Checkpoints(directory, keep=1)) as checkpoints:
        for step, score in ((1, 1.2), (2, 1.9), (3, 1.4), (4, 1.3)):
            params = jax.tree.map(lambda x: x * jnp.float32(step), tiny_params(CONFIG))  # noqa: B023
            checkpoints.save(step, {}, score, params=params)
        checkpoints.wait()
        assert checkpoints.steps == [2, 4]
        assert checkpoints.find("best") == 2
        assert checkpoints.find(None) == 4
    assert load_run(tmp_path / "run", "best").source.endswith("step 2")


def test_the_best_of_checkpoints_that_were_not_judged_is_an_error(run_dir):
    with pytest.raises(UserError, match="were not evaluated; give --step N"):
        load_run(run_dir, "best")
