"""Files that policies cannot be added to: known before anything is measured."""

from __future__ import annotations

import pytest
from hf_tiny import expect_user_error
from infer_tiny import failing_run, save_tiny_models

from infer.calibrate.__main__ import main as calibrate
from s2d_jax.errors import UserError


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_tiny_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"garbage", "is not valid JSON"),
        (b"\x80\x81", "not UTF-8 at byte 0"),
        (b"[1]", "holds a JSON list, an object is expected"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"policies": ' + b"9" * 5_000 + b"}", "a number of thousands of digits"),
        (b'{"policies": {}}', "policies={} must be a list; calibrate the target again"),
        (b'{"policies": [null]}', r"policies\[0\]: None must be an object"),
        (b'{"policies": [{"key": {"target": 1}}]}', r"policies\[0\]: key: target=1 must be a text"),
    ],
)
def test_policies_that_cannot_be_added_to(models, tmp_path, monkeypatch, capsys, content, message):
    """Known before anything is measured; the file stays."""
    out = tmp_path / "policies.json"
    out.write_bytes(content)
    arguments = ("--target", models.large, "--draft", models.draft, "--out", out)
    line = failing_run(calibrate, monkeypatch, capsys, *arguments)
    assert str(out) in line
    with expect_user_error(message):
        raise UserError(line)
    assert out.read_bytes() == content
