"""Every block of code in README and docs runs on tiny models as a reader pastes it, or is understood by its command."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import jax
import pytest
from infer_tiny import save_tiny_models
from jax.experimental.compilation_cache import compilation_cache
from run_tiny import write_source
from snippet_models import write_models
from snippets import (
    PYTHON,
    ROOT,
    SHELL,
    Block,
    Command,
    blocks_of,
    commands_in_prose,
    commands_of,
    problem_of,
    run_command,
    run_python,
    starts_known,
)

FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(file.relative_to(ROOT)) for file in FILES]
# Drawings, and what a screen showed; code does not hide there.
TEXT = {"text"}
# How the README's commands are made small: what is found in a line, and what takes its place.
SUBSTITUTIONS = (
    (r"--config configs/vicuna7b_soft.yaml", "--config run.yaml --train.run-dir runs/demo/run"),
    (r"--config FILE --draft.exit-adapters 6 9", "--config run.yaml --train.run-dir runs/heads --draft.exit-adapters 1 2"),
    (r"--watch.target DIR", "--watch.target model"),
    (r"--target DIR2", "--target draft"),  # as deep as the other: programs serve both
    (r"--target DIR", "--target large"),
    (r"--draft DIR", "--draft draft"),
    (r"\bFILE.jsonl|\bCONVERSATIONS", "prompts.jsonl"),
    (r"--max-new-tokens \d+", "--max-new-tokens 8"),
    (r"(infer.(generate|bench)) (?!.*--max-new-tokens)", r"\1 --max-new-tokens 8 "),
    (r"--batch-size \d+", "--batch-size 2"),
    (r"--size 32000", "--size 280"),
    (r"s2d:4,s2d\+tree,s2d\+tree:16,sd@6\+tree", "s2d+tree"),
    (r"ar,draft,sd@6,sd@9,sd@12,s2d,auto", "s2d"),  # auto needs what infer.calibrate measured
    (r"\[--temperature 0.7\]", ""),
    (r"--tree-nodes 16|--tree(?= --prompt)|(?<=s2d\+tree)$", r"\g<0> --tree-depth 3 --tree-top-k 3 --tree-nodes 10"),
)  # fmt: skip
# How a line begins, and why it is understood by its command, but not run.
PARSED_ONLY = {
    "README.md": {
        "make demo": "fetches weights and trains for a quarter of an hour",
        "pip install": "installs",
        "python -m train.memory --out": "compiles steps of models of 7B parameters and more",
        "python -m train.main --config FILE --objective.teachers": "test_train_teachers.py in tests/train runs it",
        "python -m infer.calibrate --target DIR": "measures for minutes; tests/calibration runs it",
        "python -m infer.generate --target DIR --draft DIR --policy auto": "needs what infer.calibrate measured",
    },
    "CONTRIBUTING.md": {"make ": "runs the suite"},
    "docs/benchmarks.md": {"python ": "measures real weights, which are not here, for hours"},
    "docs/experiments.md": {"python ": "trains on real weights, which are not here, for hours"},
    "docs/training.md": {
        "JAX_COORDINATOR_ADDRESS=": "needs several hosts; tests/train/test_processes.py has some",
        "python -m train.plan --config configs/vicuna7b_soft.yaml --topology": "needs libtpu",
        "python -m train.plan --config configs/vicuna7b_soft.yaml --devices": "compiles a step of a model of 7B",
    },
}  # fmt: skip
TINY_RUN = """
model: {path: none}
data: {paths: [none.jsonl]}
"""


@functools.cache
def blocks_in(name: str) -> list[Block]:
    return blocks_of((ROOT / name).read_text(encoding="utf-8"), name)


@functools.cache
def commands_in(name: str) -> list[Command]:
    shell = [b for b in blocks_in(name) if b.language in SHELL]
    return [command for block in shell for command in commands_of(block)]


def reasons(command: Command) -> list[str]:
    """The entries of `PARSED_ONLY` that name this command."""
    return [key for key in PARSED_ONLY.get(command.file, {}) if command.text.startswith(key)]


@pytest.fixture
def tiny_run(tmp_path):
    """The least that `--config FILE` may hold."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_RUN)
    return path


@pytest.fixture
def settings_are_given_back():
    """A reader's process would keep them; so that programs are not looked for in a folder that is gone."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.parametrize("name", NAMES)
def test_every_block_is_run_or_understood_or_listed(name):
    for block in blocks_in(name):
        assert block.language in PYTHON | SHELL | TEXT, f"{name}:{block.line} is {block.language}"
        if block.language in TEXT:
            code = re.search(r"^(python|s2d-|make |pip |from \w+ import|import )", block.text, re.M)
            assert code is None, f"{name}:{block.line} is code: {code}"
    for command in commands_in(name):
        assert starts_known(command), f"{command}: starts no command; mend it, or list the block"


def test_the_lists_name_what_there_is():
    commands = [command for name in NAMES for command in commands_in(name)]
    named = {(command.file, key) for command in commands for key in reasons(command)}
    assert named == {(name, key) for name, keys in PARSED_ONLY.items() for key in keys}
    run = [command.text for command in commands_in("README.md") if not reasons(command)]
    for pattern, _ in SUBSTITUTIONS:
        assert any(re.search(pattern, text) for text in run), pattern


ON_A_MESH = pytest.mark.exhaustive(
    "tests/model decodes on a mesh, and the README's Python always runs"
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=ON_A_MESH if n == "docs/pods.md" else ())
        for n in NAMES
        if any(b.language in PYTHON for b in blocks_in(n))
    ],
)
def test_python_runs_as_pasted(name, tmp_path, monkeypatch, capsys, settings_are_given_back):
    write_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    # A path that is not there is no hub id.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run_python([block for block in blocks_in(name) if block.language in PYTHON])


def test_the_first_python_block_takes_what_make_demo_leaves():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    values = dict(re.findall(r"^(\w+) := (.*)$", makefile, re.MULTILINE))
    draft = values["DRAFT"].replace("$(DEMO)", values["DEMO"])
    first = next(block for block in blocks_in("README.md") if block.language in PYTHON)
    assert f'("{values["MODEL"]}", "{draft}")' in first.text


@pytest.mark.parametrize("name", NAMES)
def test_commands_are_understood(name, tiny_run):
    text = (ROOT / name).read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```", lambda block: "\n" * block[0].count("\n"), text, flags=re.DOTALL)
    commands = [*commands_in(name), *commands_in_prose(prose, name)]
    assert not [problem for c in commands if (problem := problem_of(c, tiny_run))]


def test_commands_of_the_readme_run(tmp_path, monkeypatch, capsys):
    save_tiny_models(tmp_path)
    write_source(tmp_path)
    rows = [{"prompt": "Why is the sky blue?"}, {"prompt": "And the sea?"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    for command in commands_in("README.md"):
        if not reasons(command):
            run_command(made_small(command))
    left = (
        "ANSWERS.jsonl",
        "runs/bench/report.md",
        "runs/explain/large/trees.txt",
        "runs/demo/export/exit_01",
        "runs/heads/small/sorted_draft.json",
    )
    assert all(Path(path).exists() for path in left)


def made_small(command: Command) -> Command:
    text = command.text
    for pattern, small in SUBSTITUTIONS:
        text = re.sub(pattern, small, text)
    return Command(command.file, command.line, text)


WRONG = {
    "python -m infer.generate --target DIR --drafft DIR": "--drafft, DIR; did you mean --draft?",
    "s2d-bench --target DIR --questions FILE.jsonl --methods fast": "method 'fast' is unknown",
    "python -m train.main --config FILE --optim.learning-rat 1e-4": "--optim.learning-rat",
    "python -m train.plan --config configs/none.yaml --devices 8": "configs/none.yaml does not exist",
    "s2d-generat --prompt x": "s2d-generat is no script",
    "python -m infer.nothing --prompt x": "No module named 'infer.nothing'",
    "pip install -e '.[gguf,cuda99]'": "no extra cuda99",
    "make tests": "no target tests",
    "python docs/checks/none.py": "No such file",
    "python docs/checks/width_cost.py": "takes 1 to 3 words, not 0",
    "python docs/checks/tree_sweep.py --target DIR --questions FILE --out DIR --nods 3": "--nods, 3",
    "python docs/checks/suite_profile.py --nods 3": "has no flag --nods",
    'python docs/checks/alternate.py 3 "python docs/checks/none.py" "python docs/checks/plain_hf.py DIR 96"': "none.py",
}  # fmt: skip


def test_wrong_commands_are_noticed(tiny_run):
    text = "\n".join(["# Title", "```", *WRONG, "```", ""])
    (block,) = blocks_of(text, "README.md")
    commands = commands_of(block)
    assert [command.line for command in commands] == list(range(3, 3 + len(WRONG)))
    for command, message in zip(commands, WRONG.values(), strict=True):
        problem = problem_of(command, tiny_run)
        assert problem is not None, command
        assert problem.startswith(f"README.md:{command.line}: ")
        assert message in problem.removeprefix(str(command))


def test_wrong_blocks_are_noticed(capsys):
    blocks = blocks_of("```python\nx = 1\n```\n\n```python\nprint(x, mesh)\n```\n", "x.md")
    with pytest.raises(NameError, match="mesh") as found:
        run_python(blocks)
    assert found.traceback[-1].lineno + 1 == 6
    with pytest.raises(ValueError, match=r"README.md:1: a block that is not closed"):
        blocks_of("```\nmake demo\n", "README.md")
    (typo,) = commands_of(blocks_of("```\npyhton -m infer.generate\n```", "x.md")[0])
    assert not starts_known(typo)
    with pytest.raises(AssertionError, match=r"x.md:7: .* exit status 2"):
        run_command(Command("x.md", 7, "python -m infer.generate --drafft DIR"))
