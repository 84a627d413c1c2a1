"""Calibration of a target on a mesh: parts of a round that are compiled as rounds are there, and policies of one mesh."""

from __future__ import annotations

import dataclasses
import json
import time

import jax
import numpy as np
import pytest
from infer_tiny import VOCAB, run, save_tiny_models
from split_pair import noisy_draft, split, tiny_target
from tiny import tiny_draft

from infer.bench import __main__ as bench
from infer.calibrate import __main__ as calibrate
from s2d_jax.calibration import choose, record, time_chains, time_trees, timing
from s2d_jax.calibration.choose import Calibration, Effort
from s2d_jax.compilers.collectives import count_collectives
from s2d_jax.compilers.hlo import parse_hlo
from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.decode.programs import compile_part
from s2d_jax.errors import UserError
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.generation.policy import PolicyKey, read_policies
from s2d_jax.sharding import MeshConfig, make_mesh
from s2d_jax.weights.export import export_draft
from s2d_jax.weights.load import load_draft, load_model

PROMPTS = [[5, 9, 2], [7, 7, 1, 3, 30, 12, 50], [4]]


def _mesh(data: int, tensor: int):
    return make_mesh(MeshConfig(data=data, tensor=tensor))


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def draft(target):
    return noisy_draft(target)


@pytest.fixture
def compiled(monkeypatch):
    """What calibration compiles meanwhile, in order."""
    found = []

    def kept(function, inputs):
        found.append(compile_part(function, inputs))
        return found[-1]

    for module in (timing, time_chains, time_trees):
        monkeypatch.setattr(module, "compile_part", kept)
    return found


def _parts(name, target, draft):
    if name == "verify":
        return [time_chains.verify_program(target, 3)]
    if name == "judge":
        return [time_chains.judge_program(target, 3, 1.0)]
    if name == "head":
        return [timing.head_program(target, draft, 2)]
    if name == "verify tree":
        return [time_trees.verify_tree_program(target, draft, 8)]
    if name == "grow":
        return list(time_trees.level_programs(target, draft, 2).values())
    return list(time_chains.draft_programs(target, draft, (1, 2)).values())


MORE = pytest.mark.exhaustive("all parts go through the one function that compiles them")
PARTS = [
    "head",
    *(
        pytest.param(name, marks=MORE)
        for name in ("verify", "draft", "judge", "verify tree", "grow")
    ),
]


@pytest.mark.parametrize("name", PARTS)
def test_a_group_runs_the_part_of_one_device_and_sends_nothing(target, draft, compiled, name):
    for program in _parts(name, split(target, _mesh(8, 1)), draft):
        assert program() > 0
    _parts(name, target, draft)
    many, one = compiled
    assert count_collectives(parse_hlo(many.as_text())) == {}
    flops = [program.cost_analysis()["flops"] for program in (many, one)]
    assert flops[0] == pytest.approx(flops[1], rel=0.01)


@pytest.mark.exhaustive("calibration through the command line records a trace, too")
def test_a_trace_is_that_of_one_device(target, draft):
    """Three sequences over two groups, so that one group passes over nothing at last."""
    rng = np.random.default_rng(0)
    sequences = [rng.integers(64, size=length).tolist() for length in (19, 12, 16)]
    rest = sequences, [3, 7, 1], 9, 1.0
    told = []
    one = record.record_trace(target, draft, *rest, lambda: None)
    many = record.record_trace(split(target, _mesh(2, 2)), draft, *rest, lambda: told.append(1))
    assert len(told) == len(many.answers) == 3
    for ours, expected in zip(many.answers, one.answers, strict=True):
        assert ours.prompt == expected.prompt
        assert np.array_equal(ours.rank, expected.rank)
        for name in ("confidence", "accepted", "log_probs"):
            pair = getattr(ours, name), getattr(expected, name)
            np.testing.assert_allclose(*pair, rtol=1e-4, atol=1e-4)


@pytest.fixture
def few_parts(monkeypatch):
    """Little is compiled, and the best candidate wins, however it does on devices that are threads of one CPU."""
    monkeypatch.setattr(record, "BATCH", 2)
    monkeypatch.setattr(choose, "WIDTHS", (1, 3))
    monkeypatch.setattr(choose, "CONFIRMED", 1)
    monkeypatch.setattr(choose, "SMALLEST_GAIN", 0.0)
    monkeypatch.setattr(time_trees, "MEASURED_NODES", (8, 16))


def test_calibrate_then_auto_on_a_mesh(tmp_path, monkeypatch, capsys, few_parts):
    models, one_exit = save_tiny_models(tmp_path), tmp_path / "one_exit"
    alone = load_model(models.small)
    tokenizer = alone.tokenizer
    export_draft(
        dataclasses.replace(tiny_draft(VOCAB, (1,), spread=2.0), tokenizer=tokenizer), one_exit, {}
    )
    questions = tmp_path / "q.jsonl"
    questions.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("one", "two")))
    flags = ("--target", models.small, "--draft", one_exit, "--questions", questions)
    mesh = ("--mesh.data", 2, "--mesh.tensor", 2)
    small = ("--prompts", 2, "--new-tokens", 8, "--temperature", 0, "--no-trees")
    run(calibrate.main, monkeypatch, *flags, *small, *mesh)
    assert "policies written to" in capsys.readouterr().out
    (policy,) = read_policies(one_exit / "sorted_draft.json")
    assert policy.key.device.endswith(", data 2, tensor 2")
    assert policy.config is not None

    out = tmp_path / "bench"
    rest = ("--methods", "auto", "--max-new-tokens", 8, "--out", out, "--skip-identity-check")
    run(bench.main, monkeypatch, *flags, *rest, *mesh)
    report = json.loads((out / "report.json").read_text())
    assert [row["method"] for row in report["rows"]] == ["ar", "auto"]
    assert [report["settings"][f"mesh.{x}"] for x in ("data", "tensor", "draft")] == [2, 2, "whole"]
    assert "2 prompts, data 2, tensor 2" in " ".join(capsys.readouterr().out.split())
    assert "- mesh.tensor: 2" in (out / "report.md").read_text()

    draft, auto = load_draft(one_exit), DecodeConfig(policy="auto")
    here = load_model(models.small, mesh=_mesh(2, 2))
    prompt, sampling = [{"role": "user", "content": "one"}], SamplingParams(max_new_tokens=8)
    decoder = SpeculativeDecoder(here, draft, auto)
    expected = SpeculativeDecoder(alone).generate(prompt, sampling).token_ids
    assert decoder.generate(prompt, sampling).token_ids == expected
    assert decoder.settled(0.0).config == policy.config
    elsewhere = load_model(models.small, mesh=_mesh(1, 2))
    for target, remedy in ((alone, ""), (elsewhere, " --mesh.tensor 2")):
        with pytest.raises(UserError, match=rf"has no policy for .*one_exit{remedy}$"):
            SpeculativeDecoder(target, draft, auto).generate(prompt, sampling)


@pytest.mark.exhaustive("its parts are tested one by one; two minutes to compile")
@pytest.mark.parametrize(
    ("data", "tensor", "how"), [(8, 1, "whole"), (2, 2, "whole"), (2, 2, "split"), (1, 8, "split")]
)
def test_chains_and_trees_are_chosen_on_a_mesh(target, draft, few_parts, data, tensor, how):
    mesh = _mesh(data, tensor)
    here = split(target, mesh)
    drafting = split(draft, mesh) if how == "split" else draft
    calibration = Calibration(
        here,
        drafting,
        PROMPTS,
        Effort((0.0, 1.0), 12),
        on_phase=lambda name, total: lambda count: None,
        environment={},
        started=time.perf_counter(),
    )
    for choice in calibration.choices():
        temperature = choice.policy.key.temperature
        assert choice.policy.key == PolicyKey.of(here, drafting, temperature)
        assert choice.policy.evidence["seconds"]["tree"]["verify"].keys() == {8, 16}
        sampling = SamplingParams(temperature=temperature, max_new_tokens=12)
        one, many = (
            SpeculativeDecoder(*pair, choice.policy.config).generate(PROMPTS, sampling).token_ids
            for pair in ((target, draft), (here, drafting))
        )
        assert many == one


def test_a_policy_is_of_a_whole_or_of_a_split_draft(target, draft):
    mesh = _mesh(1, 8)
    here, split_draft = split(target, mesh), split(draft, mesh)
    on_the_mesh = jax.device_put(draft.params, jax.NamedSharding(mesh, jax.P()))
    placed = dataclasses.replace(draft, params=on_the_mesh)
    keys = [PolicyKey.of(here, model, 0.0) for model in (draft, placed, split_draft)]
    assert keys[0] == keys[1]
    assert keys[2] == dataclasses.replace(keys[0], device=f"{keys[0].device}, draft split")
