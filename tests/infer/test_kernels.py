"""`python -m infer.bench --kernels`: every form is compiled, timed and reported, and a form's row says what was run."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
from infer_tiny import failing_run, run
from tiny import tiny_config, tiny_params

from infer.bench import __main__ as bench
from infer.bench import kernels
from infer.bench.kernels import (
    FORMS,
    Chain,
    TimedForm,
    chain_of,
    compile_loop,
    make_weights,
    time_forms,
)
from s2d_jax.backends import CPU
from s2d_jax.errors import UserError
from s2d_jax.model.products.forms import plain
from s2d_jax.model.products.linear import form_of
from s2d_jax.model.products.weight_formats import WEIGHT_FORMATS, weight_bytes
from s2d_jax.weights.export import save_model

SMALL = Chain((32, 48, 64), 1)


def test_the_chain_exceeds_a_cache_in_every_format():
    for config in (
        None,
        tiny_config(embed_dim=576, ffw_dim=1536),
        tiny_config(embed_dim=4096, ffw_dim=11_008),
    ):
        chain = chain_of(config)
        assert sum(out * columns for out, columns in chain.shapes) >= 96 << 20
        for (out, _), (_, columns) in zip(chain.shapes, chain.shapes[1:], strict=False):
            assert out == columns


def test_a_model_whose_layers_are_too_small_is_refused():
    with pytest.raises(UserError, match=r"layers have .* weights, .* time a larger model"):
        chain_of(tiny_config())


def test_the_loop_runs_the_whole_chain_every_trip():
    weights = make_weights(SMALL, "f32")
    x = np.random.default_rng(1).standard_normal((3, 32), np.float32)
    compiled = compile_loop(plain, 3, jnp.float32, weights)
    out, expected = np.asarray(compiled(jnp.asarray(x), weights, 2)), x.astype(np.float64)
    for _ in range(2):
        for w in weights:
            expected = np.tanh(expected @ np.asarray(w, np.float64).T)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_every_form_is_timed_and_the_picked_ones_are_marked():
    ticks = []
    rows = time_forms(SMALL, (2,), 2, ticks.append)
    assert len(rows) == len(FORMS)
    assert len(ticks) == 3 * len(rows)
    assert all(row["milliseconds"] > 0 for row in rows)
    for weight_format in WEIGHT_FORMATS:
        (picked,) = [r["form"] for r in rows if r["picked"] and r["format"] == weight_format]
        form = form_of(CPU, weight_format, 2)
        assert TimedForm(weight_format, picked, form) in FORMS
    flops = 2 * sum(out * columns for out, columns in SMALL.shapes)
    assert rows[0]["gf_per_s"] == pytest.approx(flops * 2 / rows[0]["milliseconds"] / 1e6)
    held = weight_bytes(make_weights(SMALL, "f32"))
    assert rows[0]["gb_per_s"] == pytest.approx(held / rows[0]["milliseconds"] / 1e6)


def test_the_command_writes_its_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "_SMALLEST_BYTES", 1)
    monkeypatch.setattr(kernels, "ROWS", (1, 16))
    monkeypatch.setattr(kernels, "FORMS", (FORMS[0], FORMS[-1]))
    monkeypatch.setattr(kernels, "_REPEATS", 1)
    monkeypatch.setattr(kernels, "read_bandwidth", lambda: 10.0)
    monkeypatch.setattr(kernels, "matmul_peak", lambda: 100.0)
    config, out = tiny_config(), tmp_path / "out"
    save_model(tmp_path / "m", config, tiny_params(config), None)
    run(bench.main, monkeypatch, "--kernels", "--target", tmp_path / "m", "--out", out)
    report = json.loads((out / "kernels.json").read_text())
    assert report["chain"] == {"dims": [32, 32, 48], "num_layers": 1}
    assert report["machine"] == {"gb_per_s": 10.0, "gf_per_s": 100.0}
    assert {path.name for path in out.iterdir()} == {"kernels.json", "kernels.md", "kernels.png"}
    assert "memory reads 10.0 GB/s" in (out / "kernels.md").read_text()
    shown = capsys.readouterr().out
    assert "two int8 digits" in shown
    assert max(len(line) for line in shown.splitlines()) <= 100


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--kernels", "--target", "nowhere"), "nowhere does not exist; give a Hugging Face"),
        (("--target", "x"), "no --questions were given; give a file of prompts"),
        (("--target", "x", "--target-format", "int4"), "int4"),
        (("--target", "x", "--draft-format", "f16"), "f16"),
    ],
)
def test_mistakes_get_one_line(tmp_path, monkeypatch, capsys, flags, message):
    out = tmp_path / "out"
    assert message in failing_run(bench.main, monkeypatch, capsys, *flags, "--out", out)
    assert not out.exists()


def test_the_machine_is_measured():
    assert kernels.read_bandwidth(1 << 22) > 0
