"""Strict configuration: what is read, and the one line that each mistake gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from s2d_jax.errors import UserError
from train.config.files import load_config, parse_command_line
from train.main import Args, main

CONFIGS = Path(__file__).parents[2] / "configs"
MINIMAL = "model: {path: some/model, num_layers: 12}\ndata: {paths: [chat.json]}\n"


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write


def parse(path: str, *overrides: str):
    return parse_command_line(Args, ["--config", path, *overrides], "train.main").settings


def test_defaults_are_the_papers_recipe(write):
    config = load_config(CONFIGS / "vicuna7b_soft.yaml")
    assert config.draft.exit_layers == (6, 9, 12)
    assert config.draft.loss_weights == (1.0, 1.0, 1.0)
    assert (config.model.num_layers, config.model.remat) == (12, "block")
    assert (config.data.max_length, config.train.batch_size, config.train.epochs) == (2048, 128, 3)
    assert (config.optim.learning_rate, config.optim.warmup_fraction) == (2e-5, 0.04)
    assert config.optim.weight_decay == 0
    assert config.model.compute_dtype == "bfloat16"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_of_the_project_loads(path):
    load_config(path)


def test_the_command_line_overrides_the_file(write):
    config = parse(
        write(MINIMAL + "optim: {learning_rate: 2e-5}\n"),
        *("--optim.learning-rate", "1e-4", "--draft.exit-layers", "4", "12"),
        *("--draft.exit-weights", "1", "3", "--model.remat", "none", "--train.max-steps", "7"),
    )
    assert config.optim.learning_rate == 1e-4
    assert config.draft.exit_layers == (4, 12)
    assert config.draft.loss_weights == (1.0, 3.0)
    assert config.model.remat == "none"
    assert config.train.max_steps == 7


def test_what_a_run_writes_reads_back_equal(write):
    config = parse(write(MINIMAL), "--train.max-minutes", "2.5", "--optim.learning-rate", "1e-7")
    assert load_config(write(config.to_yaml())) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "optim: {learning_rat: 1}",
            r"unknown key optim.learning_rat; did you mean optim.learning_rate\? known keys: l",
        ),
        ("optimizer: {}", r"unknown key optimizer; did you mean optim\? known keys: model, data"),
        ("train: {batch_size: 1.5}", r"train.batch_size=1.5 must be a whole number, not a number"),
        ("train: {batch_size: true}", r"train.batch_size=True must be a whole number, not true or"),
        ("train: {batch_size: '8'}", r"train.batch_size='8' must be a whole number, not text"),
        ("draft: {exit_layers: 6}", r"draft.exit_layers=6 must be a list, not a whole number"),
        ("draft: {exit_layers: [6, x]}", r"draft.exit_layers\[1\]='x' must be a whole number"),
        (
            "model: {path: m, compute_dtype: half}",
            r"compute_dtype='half' is unknown; use one of fl",
        ),
        ("model: {num_layers: 12}", r"model.path is missing; it has no default"),
        ("optim: 3", r"optim must hold `key: value` pairs, not a whole number"),
        ("optim: {learning_rate: -1}", r"optim.learning_rate=-1.0 must be above 0"),
        ("optim: {learning_rate: .inf}", r"optim.learning_rate=inf must be a finite number"),
        ("optim: {beta1: .nan}", r"optim.beta1=nan must be a finite number"),
        ("train: {epochs: .inf}", r"train.epochs=inf must be a finite number"),
        ("train: {seed: 18446744073709551616}", r"train.seed=.* of at most 64 bits"),
        ("data: {paths: [x], max_length: 1000000000000}", r"tokens a step; at most 2147483647"),
        (
            "model: {path: m, lora_rank: 1000000000}",
            r"lora_rank=1000000000 must be 0 \(none\) to 16384",
        ),
        (
            "draft: {adapter_rank: 1000000000}",
            r"draft.adapter_rank=1000000000 must be at most 16384",
        ),
        ("watch: {draft_tokens: 100000}", r"watch.draft_tokens=100000 must be 1 to 1024"),
        ("data: {paths: [x], num_proc: 100000}", r"data.num_proc=100000 must be 1 to 1024"),
        ("mesh: {fsdp: 100000}", r"is 100000 devices; a mesh has 65536 at most"),
        ("optim: [", r"not valid YAML"),
        (
            "draft: {exit_layers: [6, 9, 16]}",
            r"exit_layers=\(6, 9, 16\) exceeds num_layers=12; drop",
        ),
        ("draft: {exit_layers: [6, 9]}", r"ends before the draft's 12 layers; add exit 12, or set"),
        (
            "draft: {exit_weights: [1, 2]}",
            r"has 2 values for 3 exits \(6, 9, 12\); give one per ex",
        ),
        ("draft: {exit_thresholds: [0.5, 0.5, 0.5]}", r"the last exit always accepts"),
        ("train: {batch_size: 6, accumulate: 4}", r"does not divide into train.accumulate=4 parts"),
        ("mesh: {data: 3}", r"128 rows do not divide over mesh.data x mesh.fsdp = 3; choose a mul"),
        ("data: {paths: []}", r"data.paths is empty; give at least one conversation file"),
    ],
)
def test_a_bad_file_gets_one_line_that_names_it(write, text, message):
    name = text.split(":")[0]
    kept = "".join(line for line in MINIMAL.splitlines(True) if not line.startswith(f"{name}:"))
    with pytest.raises(UserError, match=message) as error:
        load_config(write(kept + text + "\n"))
    assert "run.yaml: " in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("--optim.learning-rat", "1"),
            "--optim.learning-rat, 1; did you mean --optim.learning-rate?",
        ),
        (
            ("--optim.learning-rate", "x"),
            "--optim.learning-rate: could not convert string to float: 'x'",
        ),
        (("--optim.learning-rate", "-1"), "error: optim.learning_rate=-1.0 must be above 0"),
        (("--model.num-layers", "11"), "error: exit_layers=(6, 9, 12) exceeds num_layers=11; drop"),
        (
            ("--model.remat", "maybe"),
            "invalid choice 'maybe' for argument '--model.remat'. Expected one of ('none', ",
        ),
        (("--draft.exit-layers", "6", "x"), "--draft.exit-layers"),
        (("--model.path", "/nowhere/model"), "/nowhere/model does not exist; give a"),
    ],
)
def test_a_bad_command_line_exits_2_with_one_line(write, capsys, tmp_path, overrides, message):
    run_dir = tmp_path / "run"
    status = main(["--config", write(MINIMAL), "--train.run-dir", str(run_dir), *overrides])
    assert status == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is missing; give a YAML file"),
        (["--config"], "--config is the last word; give it a YAML file"),
        (["--config", "nowhere.yaml"], "nowhere.yaml does not exist; give --config"),
    ],
)
def test_without_a_config_file(capsys, arguments, message):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_help_explains_every_section(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for word in (
        "--optim.learning-rate",
        "--draft.exit-layers",
        "--mesh.fsdp",
        "Peak rate",
        "2e-05",
    ):
        assert word in text
