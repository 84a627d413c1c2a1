"""`python -m infer.accelerator_check` in its smallest form, its arithmetic, and its coins."""

from __future__ import annotations

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from infer_tiny import failing_run, run
from tiny import tiny_config, tiny_params

from infer.accelerator_check import __main__ as command
from infer.accelerator_check import check as checking
from infer.accelerator_check.args import Args
from infer.accelerator_check.arithmetic import (
    decode_bytes,
    layer_weights,
    prefill_flops,
    tokens_per_round,
    training_flops,
)
from infer.accelerator_check.coins import CoinRequest, CoinVerifier
from infer.accelerator_check.parts import ACCEPTANCES, PARTS
from infer.accelerator_check.report import share_of_limit
from infer.accelerator_check.subject import (
    SIZES,
    Subject,
    choose_size,
    most_devices,
    random_params,
    subject_of,
)
from infer.accelerator_check.training import trainer_of
from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.draft import DraftConfig
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.decode.programs import lower_run
from s2d_jax.draft.drafter import Proposal
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.model.params import abstract_params
from s2d_jax.sharding import MeshConfig, make_mesh, replicated
from s2d_jax.weights.export import save_model
from s2d_jax.weights.model import Draft, Model
from train.plan.step_memory import shapes_of_batch

NAMES = [part.name for part in PARTS]


def written(directory) -> dict:
    return json.loads((directory / "accelerator_check.json").read_text())


def test_the_smallest_form_measures_every_part(tmp_path, monkeypatch, capsys):
    # The products that measure a CPU's peak take seconds, and test_kernels.py runs them.
    monkeypatch.setattr("infer.accelerator_check.parts.read_bandwidth", lambda: 10.0)
    monkeypatch.setattr("infer.accelerator_check.parts.matmul_peak", lambda dtype: 50.0)
    run(command.main, monkeypatch, "--out", tmp_path, "--repeats", 2, "--mesh.tensor", 1)
    report = written(tmp_path)
    assert list(report["parts"]) == NAMES
    assert {"jax", "jaxlib", "s2d_jax", "devices"} <= set(report["environment"])
    assert (report["device_kind"], report["devices_used"]) == (jax.devices()[0].device_kind, 1)
    assert report["subject"]["name"] == "tiny"
    parts = report["parts"]
    limits = parts["limits"]
    assert (limits["bandwidth"], limits["flops"]) == (10e9, 50e9)
    assert "no limit is known" in limits["source"]
    verify = parts["verify"]
    assert [row["width"] for row in verify["rows"]] == [1, 4]
    assert verify["rows"][0]["ratio"] == 1
    assert all(len(raw) == 2 for raw in verify["raw_seconds"].values())
    plain = verify["plain"]
    assert plain["bytes_per_second"] == pytest.approx(
        plain["bytes_per_token"] * plain["tokens_per_second"]
    )
    assert [row["exit"] for row in parts["rounds"]["rows"]] == [1, 2]
    for row in parts["rounds"]["rows"]:
        assert min(row.values()) > 0
        assert row["draft"] > row["step"]
    assert parts["prefill"]["rows"][0]["tokens"] == 32
    training = parts["training"]
    rate = training["rows"] * training["length"] / np.median(training["raw_seconds"])
    assert training["flops_per_second"] == pytest.approx(rate * training["flops_per_token"])
    simulated = parts["simulated"]
    assert [row["acceptance"] for row in simulated["rows"]] == list(ACCEPTANCES)
    for row in simulated["rows"]:
        pairs = simulated["raw_tokens_and_seconds"][str(row["acceptance"])]
        assert {tokens for tokens, _ in pairs} == {row["tokens_per_round"] * simulated["rounds"]}
    page = (tmp_path / "report.md").read_text()
    assert "**Acceptance is simulated**" in page
    assert "![verify passes by width](verify.png)" in page
    assert (tmp_path / "verify.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert max(map(len, shown.replace(str(tmp_path), "").splitlines())) <= 100
    assert "a CPU gets the smallest size" in shown


def only(monkeypatch, *measures) -> None:
    """Lets the command run these functions as parts of these names."""
    parts = {part.name: part for part in PARTS}
    chosen = [dataclasses.replace(parts[name], measure=measure) for name, measure in measures]
    monkeypatch.setattr(checking, "PARTS", chosen)


def limits(subject, repeats, tick):
    measured = {"bandwidth": 1e9, "flops": 1e9}
    return {**measured, "source": "here", "devices": 1, "measured_on_one_device": measured}


def failing(error: BaseException):
    def measure(subject, repeats, tick):
        raise error

    return measure


def test_a_part_without_room_is_one_line_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
    only(monkeypatch, ("verify", failing(full)), ("limits", limits))
    run(command.main, monkeypatch, "--out", tmp_path)
    parts = written(tmp_path)["parts"]
    assert parts["verify"] == {"failed": checking.NO_ROOM}
    assert parts["limits"]["source"] == "here"
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("Verify passes")]
    assert "did not fit into the device's memory" in line
    assert "This part did not fit" in (tmp_path / "report.md").read_text()


def test_other_errors_are_not_taken_for_too_little_memory(tmp_path, monkeypatch):
    error = jax.errors.JaxRuntimeError("INTERNAL: something else")
    only(monkeypatch, ("limits", failing(error)))
    monkeypatch.setattr(sys, "argv", ["check", "--out", str(tmp_path)])
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        command.main()


def test_what_was_measured_before_an_interruption_is_kept(tmp_path, monkeypatch, capsys):
    only(monkeypatch, ("limits", limits), ("verify", failing(KeyboardInterrupt())))
    monkeypatch.setattr(sys, "argv", ["check", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert stop.value.code == 130
    assert list(written(tmp_path)["parts"]) == ["limits"]
    assert "## Limits" in (tmp_path / "report.md").read_text()
    assert "the parts that were finished are in" in capsys.readouterr().err


@pytest.mark.parametrize("acceptance", [0.0, 0.6, 0.9, 1.0])
def test_coins_accept_as_often_as_the_formula_says(acceptance):
    """A mean of 20,000 rounds is further than 4.5 standard errors from a right formula once in 150,000 times."""
    B, G, V = 20_000, 5, 4
    nothing_BG = jnp.zeros((B, G), jnp.int32)
    proposal = Proposal(nothing_BG, jnp.full(B, G, jnp.int32), None, nothing_BG)
    key_B = jax.vmap(jax.random.key)(jnp.arange(B, dtype=jnp.uint32))
    verified = dataclasses.make_dataclass("Verified", ["proposal", "logits_BTV", "key_B"])(
        proposal, jnp.zeros((B, G + 1, V)), key_B
    )
    fields = {field.name: None for field in dataclasses.fields(CoinRequest)}
    request = CoinRequest(**{**fields, "acceptance_B": jnp.full(B, acceptance, jnp.float32)})
    judged = jax.jit(
        lambda key_B: CoinVerifier(True, (G + 1,)).judge(request, None, verified).num_accepted_B
    )(key_B)
    tokens_B = np.asarray(judged) + 1
    error = 4.5 * tokens_B.std() / B**0.5
    assert abs(tokens_B.mean() - tokens_per_round(acceptance, G)) <= error
    assert 0 < tokens_B.min() <= tokens_B.max() <= G + 1


def test_operations_and_bytes_equal_a_computation_by_hand():
    config = SIZES["7b"].config
    # 4 x 4096 x 4096 of attention, 3 x 4096 x 11,008 of the feed-forward network.
    assert layer_weights(config) == 67_108_864 + 135_266_304
    # 32 layers, and a head of 32,000 x 4096.
    weights = 32 * 202_375_168 + 131_072_000
    assert decode_bytes(config, 100) == 2 * (weights + 2 * 32 * 4096 * 100)
    draft = dataclasses.replace(config, num_layers=12)
    # Attention over 1024.5 positions in the mean: 4 x 12 x 4096 x 1024.5 operations forward.
    attention = 201_424_896
    assert (
        training_flops(draft, 3, 2048) == 6 * (12 * 202_375_168 + 3 * 131_072_000) + 3 * attention
    )
    one = 2 * 32 * 202_375_168 + 4 * 32 * 4096
    assert prefill_flops(config, 1) == one + 2 * 131_072_000


def test_weights_are_counted_as_they_are():
    config = dataclasses.replace(SIZES["tiny"].config, num_layers=3)
    matrices = [x for x in jax.tree.leaves(abstract_params(config)) if len(x.shape) == 2]
    embedding = config.vocab_size * config.embed_dim
    counted = 3 * layer_weights(config) + 2 * embedding
    assert sum(x.size for x in matrices) == counted


def test_figures_without_a_known_limit_say_so():
    assert share_of_limit({"parts": {"limits": {"failed": "x"}}}, "flops", 1.0) == "no limit known"
    assert share_of_limit({"parts": {"limits": {"flops": 4.0}}}, "flops", 1.0) == "25.0 %"


@pytest.mark.parametrize(
    ("platform", "memory", "tensor", "size"),
    [
        ("cpu", 1e12, 1, "tiny"),
        ("gpu", 80e9, 1, "7b"),
        ("tpu", 16e9, 1, "1b"),
        ("tpu", 16e9, 4, "7b"),
        ("gpu", 1e9, 1, "tiny"),
    ],
)
def test_the_largest_size_that_fits_is_chosen(platform, memory, tensor, size):
    assert choose_size(platform, memory, tensor) == size


def test_as_many_devices_are_taken_as_divide_the_heads():
    found = [most_devices(SIZES[name].config, 8) for name in ("7b", "1b", "tiny")]
    assert found == [8, 4, 4]
    assert most_devices(SIZES["7b"].config, 3) == 2


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--repeats", 0), "repeats 0 must be at least 1"),
        (("--size", "tiny", "--model", "x"), "leave --size out"),
        (("--mesh.tensor", 0), "mesh.tensor 0 must be at least 1"),
        (("--model", "x", "--mesh.tensor", 2), "leave --mesh.tensor 2 out"),
        (("--mesh.tensor", 4096), "needs 4096 devices"),
        (
            ("--size", "tiny", "--mesh.tensor", 8),
            "num_heads=4 does not divide by mesh axis tensor=8",
        ),
    ],
)
def test_mistakes_are_one_line(flags, told, tmp_path, monkeypatch, capsys):
    line = failing_run(command.main, monkeypatch, capsys, "--out", tmp_path / "new", *flags)
    assert told in line


@pytest.mark.exhaustive("traces 32 layers; the sizes that always run are smaller, not different")
def test_the_largest_form_lowers_without_weights():
    size = SIZES["7b"]
    mesh = make_mesh(MeshConfig())
    whole = replicated(mesh)

    def shapes(config):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
            abstract_params(config, jnp.bfloat16),
        )

    subject = Subject("7b", size, mesh, 0)
    target = Model(size.config, shapes(size.config), None, "7B")
    config = subject.draft_config
    draft = Draft(config, shapes(config), None, "draft", DraftConfig(size.exits))
    decoder = SpeculativeDecoder(target, draft, DecodeConfig(exits=size.exits[:1]))
    static, width, (params, request, *arrays) = decoder.prepare([[1] * 128], SamplingParams())
    static = dataclasses.replace(static, verifier=CoinVerifier(True, static.verifier.widths))
    share_B = jax.ShapeDtypeStruct((1,), jnp.float32, sharding=whole)
    lowered = lower_run(static, width, (params, CoinRequest.of(request, share_B), *arrays))
    assert lowered.out_info.length_B.shape == (1,)
    trainer = trainer_of(subject, 1, size.rows)
    batch = shapes_of_batch(size.rows, size.length)
    state = trainer.abstract_state()
    _, metrics = jax.eval_shape(
        trainer._train_step, state, (), batch, np.float32(0), np.bool_(True)
    )
    assert metrics["loss_E"].shape == (3,)


def test_a_model_is_measured_beside_a_random_draft_of_its_shape(tmp_path):
    config = tiny_config(num_layers=8)
    save_model(tmp_path / "m", config, tiny_params(config), None)
    subject = subject_of(Args(model=str(tmp_path / "m")))
    assert (subject.name, subject.mesh) == (str(tmp_path / "m"), None)
    assert subject.target.dtype == subject.draft.dtype == jnp.bfloat16
    assert (subject.size.exits, subject.size.prompts) == ((1, 2, 3), (128,))
    assert (subject.target.config.num_layers, subject.draft.config.num_layers) == (8, 3)


def test_weights_are_made_on_the_device_where_they_will_be():
    mesh = make_mesh(MeshConfig())
    subject = Subject("tiny", SIZES["tiny"], mesh, 3)
    for model in (subject.target, subject.draft):
        assert {x.sharding.mesh for x in jax.tree.leaves(model.params)} == {mesh}
        assert {x.dtype.name for x in jax.tree.leaves(model.params)} == {"bfloat16"}
    again = random_params(subject.draft_config, jnp.bfloat16, 4)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, again, subject.draft.params))
    first = subject.target
    subject.release()
    assert subject.target is not first
