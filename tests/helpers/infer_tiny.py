"""Tiny models on disk, and command lines run in this process."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from tiny import tiny_draft, tiny_model, tiny_tokenizer

from s2d_jax.weights.export import export_draft, save_model

VOCAB = 300


@dataclasses.dataclass(frozen=True)
class Saved:
    """Directories of two targets, a sorted draft with exits 1 and 2, and a draft of another tokenizer."""

    small: str
    large: str
    draft: str
    stranger: str


def save_tiny_models(directory: Path) -> Saved:
    """In `directory`, for a module that may write there: copies of what is made once per process."""
    shutil.copytree(_saved_once(), directory, dirs_exist_ok=True)
    names = (field.name for field in dataclasses.fields(Saved))
    return Saved(**{name: str(directory / name) for name in names})


@functools.cache
def _saved_once() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="s2d-tiny-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    tokenizer, other = (
        tiny_tokenizer(VOCAB),
        tiny_tokenizer(VOCAB, texts=("quite other words",) * 3),
    )
    for name, num_layers in (("small", 1), ("large", 2)):
        model = tiny_model(VOCAB, num_layers, seed=num_layers, spread=2.0)
        save_model(directory / name, model.config, model.params, tokenizer)
    draft = tiny_draft(VOCAB, (1, 2), spread=2.0)
    export_draft(dataclasses.replace(draft, tokenizer=tokenizer), directory / "draft", {})
    export_draft(dataclasses.replace(draft, tokenizer=other), directory / "stranger", {})
    return directory


def run(main, monkeypatch, *arguments) -> None:
    """Calls a command line's `main` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["prog", *(str(argument) for argument in arguments)])
    main()


def failing_run(main, monkeypatch, capsys, *arguments) -> str:
    """The one line of an error; checks the exit status and that there is no traceback."""
    with pytest.raises(SystemExit) as stop:
        run(main, monkeypatch, *arguments)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1
    assert lines[-1] == errors[0]
    assert not any("Traceback" in line for line in lines)
    return errors[0]
