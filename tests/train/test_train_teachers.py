"""Whole runs with teachers, small parts, chosen layers and lists of tokens: what they leave, and that they resume."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest
from run_tiny import launch, metrics, write_source
from tiny import logits_at_exits, tiny_tokenizer

from s2d_jax.weights.checkpoints import Checkpoints
from s2d_jax.weights.load import load_model
from s2d_jax.weights.runs import load_run
from s2d_jax.weights.vocabulary import DraftVocabulary

EXITS = ["1", "2", "3"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source"))


def teacher_flags(source, **more):
    flags = {
        "--objective.teachers": source / "model",
        "--objective.teacher-dtype": "float32",
        "--objective.distill-weight": 0.9,
        "--objective.ce-weight": 0.1,
        **more,
    }
    return [str(word) for pair in flags.items() for word in pair]


@pytest.fixture(scope="module")
def distilled(source, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "distilled"
    assert launch(source, run_dir, *teacher_flags(source), "--watch.tensorboard", "True") == 0
    return run_dir


@pytest.fixture(scope="module")
def stored(source, tmp_path_factory):
    """As `distilled`, but the teacher's 8 most probable tokens are stored before."""
    run_dir = tmp_path_factory.mktemp("runs") / "stored"
    flags = teacher_flags(source, **{"--objective.teacher-top-k": 8})
    assert launch(source, run_dir, *flags, "--watch.tensorboard", "True") == 0
    return run_dir


def test_a_distilled_run_tells_divergence_and_acceptance(distilled):
    rows, held_out = metrics(distilled), metrics(distilled, held_out=True)
    assert list(rows[0]["divergence_per_exit"]) == EXITS
    for row in held_out:
        assert list(row["agreement_per_exit"]) == list(row["mat_per_exit"]) == EXITS
        assert sum(row["exit_histogram"].values()) == pytest.approx(1)
        assert row["s2d_mat"] >= 1
    assert (distilled / "progress.png").read_bytes().startswith(b"\x89PNG")


def test_agreement_is_with_the_teachers_argmax_on_held_out_rows(source, distilled):
    """The last row of the metrics, from the last checkpoint's parameters and the teacher, position by position."""
    from s2d_jax.sharding import MeshConfig, make_mesh
    from train.config.files import load_config
    from train.data.batches import make_batch, split_rows
    from train.data.rows import load_rows
    from train.step.trainer import Trainer

    config = load_config(distilled / "config.yaml")
    rows = load_rows(distilled / "rows")
    _, held_out = split_rows(len(rows), config.data.held_out_fraction, config.train.seed)
    draft, teacher = load_run(distilled), load_model(source / "model")
    trainer = Trainer(config, draft.config, make_mesh(MeshConfig()))
    batch = make_batch(rows, held_out, trainer.batch_sharding)

    def best(model, exit_layers):
        return np.asarray(logits_at_exits(model.config, model.params, batch, exit_layers)).argmax(
            -1
        )

    counts = np.asarray(batch.weights_BT) > 0
    agrees = best(draft, (1, 2, 3)) == best(teacher, (teacher.config.num_layers,))
    expected = [agrees[e][counts].mean() for e in range(3)]
    told = metrics(distilled, held_out=True)[-1]["agreement_per_exit"]
    np.testing.assert_allclose(list(told.values()), expected, rtol=1e-6)


def test_the_best_checkpoint_is_kept_beside_the_newest(distilled):
    by_step = {row["step"]: row["s2d_mat"] for row in metrics(distilled, held_out=True)}
    steps = Checkpoints(distilled / "checkpoints").steps
    best = max((by_step[step], step) for step in by_step if step in steps)[1]
    assert load_run(distilled, "best").source.endswith(f"step {best}")
    assert max((by_step[step], step) for step in by_step if step > 0)[1] == best


def test_tensorboard_gets_the_same_numbers(distilled):
    from tensorboardX.proto.event_pb2 import Event

    (file,) = (distilled / "tensorboard").iterdir()
    data, at, found = file.read_bytes(), 0, {}
    while at < len(data):  # length (8 bytes), checksum (4), event, checksum (4)
        size = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + size])
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        at += 16 + size
    row = metrics(distilled, held_out=True)[-1]
    assert found["held_out/s2d_mat", row["step"]] == pytest.approx(row["s2d_mat"], rel=1e-5)
    step = metrics(distilled)[3]
    assert found["loss_per_exit/2", 4] == pytest.approx(step["loss_per_exit"]["2"], rel=1e-5)


@pytest.mark.exhaustive("two processes stop and go on with stored values in test_processes.py")
@pytest.mark.parametrize(("fixture", "top_k"), [("distilled", 0), ("stored", 8)])
def test_a_run_with_a_teacher_resumes_exactly(source, tmp_path, request, fixture, top_k):
    flags = teacher_flags(source, **{"--objective.teacher-top-k": top_k})
    whole, parted = request.getfixturevalue(fixture), tmp_path / "parted"
    shutil.copytree(whole, parted)
    shutil.rmtree(parted / "checkpoints" / "8")
    assert launch(source, parted, *flags, "--train.resume") == 0
    strip = lambda row: {k: v for k, v in row.items() if "second" not in k}  # noqa: E731
    assert [strip(r) for r in metrics(parted)] == [strip(r) for r in metrics(whole)]
    jax.tree.map(np.testing.assert_array_equal, load_run(parted).params, load_run(whole).params)


def test_stored_probabilities_are_the_teachers(stored):
    ids = np.load(stored / "teacher_0" / "ids.npy")
    log_probs = np.load(stored / "teacher_0" / "log_probs.npy")
    filled = np.isfinite(log_probs).all(-1) & (log_probs < 0).all(-1)
    assert filled.any()
    assert (np.diff(log_probs[filled].astype(np.float32), axis=-1) <= 0).all()
    assert (np.exp(log_probs[filled].astype(np.float32)).sum(-1) <= 1.001).all()
    assert len({tuple(row) for row in ids[filled].tolist()}) > 1


def test_any_layers_make_a_draft_and_another_target_can_be_watched(source, tmp_path):
    layers = ("--model.layers", 0, 3, "--model.num-layers", "None", "--draft.exit-layers", 1, 2)
    watched = ("--watch.target", source / "model")
    assert launch(source, tmp_path / "run", *layers, *watched, "--train.max-steps", 1) == 0
    assert (tmp_path / "run" / "held_out_tokens.npy").exists()
    assert load_run(tmp_path / "run").config.num_layers == 2


def test_small_parts_learn_on_a_frozen_trunk_and_are_exported(source, tmp_path):
    parts = ("--draft.exit-adapters", "1", "--draft.adapter-rank", "4", "--draft.exit-heads", "2")
    assert launch(source, tmp_path / "run", *parts) == 0
    draft, start = load_run(tmp_path / "run"), load_model(source / "model")
    for name in ("embed", "layers_0", "layers_2", "final_norm"):
        jax.tree.map(np.testing.assert_array_equal, draft.params[name], start.params[name])
    assert np.any(draft.params["exit_adapters_1"]["up"]["kernel"])
    agreement = metrics(tmp_path / "run", held_out=True)
    # The last exit has nothing that learns.
    assert agreement[0]["loss_per_exit"]["3"] == agreement[-1]["loss_per_exit"]["3"]
    assert agreement[-1]["loss_per_exit"]["1"] < agreement[0]["loss_per_exit"]["1"]


def test_a_list_of_tokens_stays_with_the_draft(source, tmp_path):
    tokenizer = load_model(source / "model").tokenizer
    listed = DraftVocabulary.of_tokenizer(range(40), tokenizer, {})
    file = tmp_path / "vocabulary.json"
    file.write_text(json.dumps(listed.to_json()))
    flags = ("--draft.vocabulary", str(file), "--train.max-steps", "2")
    assert launch(source, tmp_path / "run", *flags) == 0
    draft = load_run(tmp_path / "run")
    assert draft.vocabulary.size == 40
    assert draft.params["trimmed_head"]["kernel"].shape[0] == 40


def test_a_teacher_of_another_tokenizer_is_refused(source, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(source / "model", other)
    tiny_tokenizer(97).save(other)
    flags = teacher_flags(source, **{"--objective.teachers": other})
    assert launch(source, tmp_path / "run", *flags) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--objective.distill-weight", "0.5"), "go together"),
        (("--objective.ce-weight", "0"), "nothing would be learned"),
        (("--train.learn", "lora"), "names lora"),
        (("--model.layers", "0", "1", "9", "--model.num-layers", "None"), "9"),
        (("--draft.exit-heads", "2", "5"), "5"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(source, tmp_path, capsys, flags, words):
    assert launch(source, tmp_path / "run", *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error
    assert not (tmp_path / "run").exists()
