"""Directories of models that are not as they should be: NaN, git-lfs pointers, pipes, old shards, paths out of them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_tiny import expect_user_error, write_gguf
from infer_tiny import VOCAB, failing_run, run, save_tiny_models
from tiny import tiny_config, tiny_draft, tiny_model, tiny_params, tiny_tokenizer, with_parts

from infer.calibrate.__main__ import main as calibrate
from infer.generate.__main__ import main as generate
from infer.trim.__main__ import main as trim
from s2d_jax.config.draft import ExitParts
from s2d_jax.errors import UserError
from s2d_jax.formats.finite import count_not_finite
from s2d_jax.formats.safetensors import save_safetensors
from s2d_jax.model.lora import LoraConfig, init_lora
from s2d_jax.weights.export import export_draft, save_model
from s2d_jax.weights.load import load_draft, load_model, read_description
from s2d_jax.weights.peft import load_peft, save_peft

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 538090408\n"
_LONGEST = 10  # seconds; whoever waits for a pipe waits for ever


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    model = tiny_model(VOCAB, 1)
    directory = tmp_path_factory.mktemp("saved") / "model"
    save_model(directory, model.config, model.params, tiny_tokenizer(VOCAB))
    return directory


@pytest.fixture
def directory(saved, tmp_path) -> Path:
    """A model that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def spoil(params, name: tuple[str, ...], value: float):
    """Copies of the tensors, with `value` at the end of one."""
    copies = jax.tree.map(np.array, params)
    at = copies
    for part in name[:-1]:
        at = at[part]
    at[name[-1]].reshape(-1)[-1] = value
    return copies


def write_shards(directory: Path, **shards: dict[str, np.ndarray]) -> None:
    """Shards and their index in place of model.safetensors."""
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for stem, tensors in shards.items():
        save_safetensors(directory / f"{stem}.safetensors", tensors)
        weight_map |= dict.fromkeys(tensors, f"{stem}.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def tensors_of(file: Path) -> dict[str, np.ndarray]:
    import safetensors.numpy

    return safetensors.numpy.load_file(file)


# Weights that are no numbers.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_counted(dtype, value):
    """Wherever it stands; the largest numbers, the smallest and both zeros are numbers."""
    largest = jnp.finfo(dtype).max
    numbers = np.array([0.0, -0.0, largest, -largest, jnp.finfo(dtype).smallest_subnormal], dtype)
    array = np.tile(numbers, 30_000).reshape(3, -1)  # longer than what is looked at together
    assert count_not_finite(array) == 0
    assert count_not_finite(array[:0]) == 0
    for places in ([0], [65_535], [65_536], [149_999], [7, 8, 140_000]):
        spoiled = array.copy()
        spoiled.reshape(-1)[places] = value
        assert count_not_finite(spoiled) == len(places)
        assert count_not_finite(spoiled.T) == len(places)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_with_nan(directory, value):
    file = directory / "model.safetensors"
    tensors = tensors_of(file)
    name = "model.layers.0.mlp.up_proj.weight"
    save_safetensors(file, spoil(tensors, (name,), value))
    with expect_user_error(
        rf"model.safetensors: tensor {name} holds 1 values that are no finite numbers; fetch the file"
    ):
        load_model(directory)
    # Its shape can be described all the same.
    assert read_description(directory)[0].num_layers == 1


def test_a_gguf_file_with_nan(tmp_path):
    config = tiny_config(num_layers=1)
    params = spoil(tiny_params(config), ("layers_0", "attn", "q_proj", "kernel"), math.nan)
    path = write_gguf(tmp_path / "m.gguf", config, params)
    with expect_user_error("m.gguf: tensor blk.0.attn_q.weight holds 1 values that are no finite"):
        load_model(path)


def test_exit_parts_with_infinity(tmp_path):
    draft = with_parts(tiny_draft(exit_layers=(1, 2)), ExitParts(heads=(1,)))
    params = spoil(draft.params, ("exit_heads_1", "kernel"), math.inf)
    export_draft(dataclasses.replace(draft, params=params), tmp_path / "out", {})
    with expect_user_error("exit_parts.safetensors: tensor exit_heads.1.weight holds 1 values"):
        load_draft(tmp_path / "out")


def test_an_adapter_with_nan(tmp_path):
    config, lora = tiny_config(num_layers=1), LoraConfig(2)
    params = tiny_params(config)
    adapted = spoil(
        init_lora(params, lora, jax.random.key(0)),
        ("layers_0", "mlp", "up_proj", "lora_b"),
        math.nan,
    )
    save_peft(tmp_path, config, adapted, lora, "base")
    with expect_user_error("adapter_model.safetensors: tensor .*up_proj.lora_B.weight holds 1"):
        load_peft(tmp_path, config, params)


# Fields of configurations.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": 0, "rope_parameters": None}, "rope_theta=0 must be a number above 0"),
        ({"rope_theta": -1e4, "rope_parameters": None}, "rope_theta=-10000.0 must be a number abo"),
        ({"rope_parameters": {"rope_theta": math.nan}}, "rope_parameters: rope_theta=nan must be"),
        ({"rope_theta": math.inf, "rope_parameters": None}, "rope_theta=inf must be a number"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps=nan must be a number"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps=0.0 must be a number above 0"),
        (
            {"eos_token_id": VOCAB},
            f"eos_token_id={VOCAB} must be a token id of the vocabulary, 0 to 299",
        ),
        ({"eos_token_id": [2, -1]}, r"eos_token_id=\[2, -1\] must be a token id of the voc"),
        ({"eos_token_id": [[2]]}, r"eos_token_id=\[\[2\]\] must be a token id"),
        ({"eos_token_id": "2"}, "eos_token_id='2' must be a token id"),
        ({"bos_token_id": "<s>"}, "bos_token_id='<s>' must be a token id"),
        ({"architectures": "LlamaForCausalLM"}, "architectures='LlamaForCausalLM' must be a list"),
        ({"architectures": [None]}, r"architectures=\[None\] must be a list of texts"),
        ({"architectures": [], "model_type": None}, "architecture None is not supported"),
        ({"attention_bias": "no"}, "attention_bias='no' must be true or false"),
        ({"hidden_size": 33}, "hidden_size=33 must be a multiple of num_attention_heads=4"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 must be a multiple of num_key_value_h"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers=10000000 must be a whole number from 1"),
        ({"num_hidden_layers": 9_000}, "asks for 9000 layers, its files hold 12 tensors"),
        ({"head_dim": 7}, "head_dim=7 must be even for RoPE"),
        ({"vocab_size": 10**400}, "vocab_size=.* must be a whole number from 1"),
    ],
)
def test_a_config_is_judged_field_by_field(directory, changes, message):
    edit(directory / "config.json", **changes)
    for load in (load_model, load_draft):
        with expect_user_error(message) as found:
            load(directory)
        assert str(found.value).count(str(directory)) == 1


def test_architectures_may_be_left_out(directory):
    for absent in (None, []):
        edit(directory / "config.json", architectures=absent, model_type="llama")
        assert load_model(directory).config.family == "llama"


def test_switches_may_be_null_and_what_only_others_read_may_be_anything(directory):
    others = {"initializer_range": "much", "use_cache": None}
    edit(directory / "config.json", attention_bias=None, mlp_bias=None, **others)
    assert load_model(directory).tokenizer is not None


@pytest.mark.parametrize("value", [VOCAB, [2, VOCAB], "2", [[2]], {"id": 2}])
def test_a_generation_config_is_judged_too(directory, value):
    edit(directory / "generation_config.json", eos_token_id=value)
    with expect_user_error(r"generation_config.json: eos_token_id=.* must be a token id"):
        load_model(directory)


def test_a_tokenizer_whose_ends_have_no_row(directory):
    """It would never end a text; single added tokens without a row end nothing, and harm nothing."""
    tensors = tensors_of(directory / "model.safetensors")
    changed = {k: v[:2] if v.shape[0] == VOCAB else v for k, v in tensors.items()}
    save_safetensors(directory / "model.safetensors", changed)
    edit(directory / "config.json", vocab_size=2, eos_token_id=None, bos_token_id=None)
    (directory / "generation_config.json").unlink()
    assert load_model(directory).config.eos_token_ids == (0,)
    tokenizer = directory / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<|endoftext|>", "<|begin|>"))
    config = directory / "tokenizer_config.json"
    config.write_text(config.read_text().replace("<|endoftext|>", "<|begin|>"))
    with expect_user_error(r"the tokenizer ends a text with \(2,\), the vocabulary has ids 0 to 1"):
        load_model(directory)


# Which files are read.


def test_a_single_file_comes_before_an_old_index(directory, monkeypatch, capsys):
    old = tensors_of(directory / "model.safetensors")
    new = {name: array + 1 for name, array in old.items()}
    write_shards(directory, old=old)
    save_safetensors(directory / "model.safetensors", new)
    model = load_model(directory)
    np.testing.assert_array_equal(
        model.params["embed"]["embedding"], new["model.embed_tokens.weight"]
    )
    assert model.notices == load_draft(directory).notices
    (notice,) = model.notices
    assert notice.startswith(
        f"{directory} holds model.safetensors and model.safetensors.index.json"
    )
    run(generate, monkeypatch, "--target", directory, "--prompt", "one", "--max-new-tokens", 1)
    assert f"note: {notice}\n" in capsys.readouterr().err


def test_without_an_index_nothing_is_noticed(directory):
    assert load_model(directory).notices == ()


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/../../x", "", 5, None, "a\0b"]
)
def test_an_index_names_nothing_outside(directory, name):
    tensors = tensors_of(directory / "model.safetensors")
    save_safetensors(directory.parent / "secret.safetensors", tensors)
    write_shards(directory, part=tensors)
    index = {"weight_map": dict.fromkeys(tensors, name)}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with expect_user_error(r"index.json names .*, a path inside .* is expected; fetch the model"):
        load_model(directory)


def test_links_to_weights_are_followed(directory):
    """The hub's cache consists of them."""
    blob = (directory / "model.safetensors").rename(directory.parent / "blob")
    (directory / "model.safetensors").symlink_to(blob)
    assert load_model(directory).config.num_layers == 1


def test_a_tensor_in_two_shards(directory):
    tensors = tensors_of(directory / "model.safetensors")
    write_shards(directory, old=tensors)
    save_safetensors(directory / "new.safetensors", tensors)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "new.safetensors"
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with expect_user_error(r"stands in .*new.safetensors and in .*old.safetensors; fetch the com"):
        load_model(directory)


# Files that are something else.


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_git_lfs_pointer(directory, name):
    (directory / name).write_bytes(POINTER)
    with expect_user_error(rf"{name} is a git-lfs pointer, not the file itself; fetch it: git lfs"):
        load_model(directory)


def test_a_gguf_file_that_is_a_git_lfs_pointer(tmp_path):
    (tmp_path / "m.gguf").write_bytes(POINTER)
    with expect_user_error("m.gguf is a git-lfs pointer, not the file itself; fetch it"):
        load_model(tmp_path / "m.gguf")


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Ends what waits for a pipe that nobody writes."""

    def end(*_: object) -> None:
        raise TimeoutError("still waiting")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(_LONGEST)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"),
        *("sorted_draft.json", "exit_parts.safetensors"),
    ],
)
def test_a_pipe_in_place_of_a_file(directory, name):
    parts = {"heads": [1], "adapters": [], "adapter_rank": 0}
    draft = {"format": 1, "exit_layers": [1], "exit_parts": parts}
    (directory / "sorted_draft.json").write_text(json.dumps(draft))
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name)
    with no_waiting(), expect_user_error(rf"{name} is a device or a pipe, a file is expected"):
        load_draft(directory)


def test_a_pipe_in_place_of_a_gguf_file(tmp_path):
    os.mkfifo(tmp_path / "m.gguf")
    with no_waiting(), expect_user_error("m.gguf is a device or a pipe, a file is expected"):
        load_model(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    "name", ["config.json", "sorted_draft.json", "model.safetensors.index.json"]
)
@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a": ' * 100_000, '{"a": ' + "9" * 5_000 + "}"]
)
def test_json_made_to_end_in_a_traceback(directory, name, content):
    if name.endswith("index.json"):
        (directory / "model.safetensors").unlink()
    (directory / name).write_text(content)
    with expect_user_error(rf"{name} is not usable JSON"):
        load_draft(directory)


@pytest.mark.parametrize(
    ("ids", "size"), [("0-1999999999", 2 * 10**9), ("0-99999999999999", 10**14)]
)
def test_a_vocabulary_subset_made_to_fill_the_memory(directory, ids, size):
    draft = {"format": 1, "exit_layers": [1], "vocabulary_subset": {"size": size, "ids": ids}}
    (directory / "sorted_draft.json").write_text(json.dumps(draft))
    with expect_user_error(rf"the draft vocabulary: size={size} must be a whole number from 1"):
        load_draft(directory)


def test_a_header_that_claims_more_than_there_is(directory):
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with expect_user_error("model.safetensors is truncated or damaged"):
        load_model(directory)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_tiny_models(tmp_path_factory.mktemp("models"))


def test_commands_say_the_same(models, tmp_path, monkeypatch, capsys):
    """Each gives the line that the library raises, and leaves nothing behind."""
    spoiled = Path(shutil.copytree(models.large, tmp_path / "spoiled"))
    edit(spoiled / "config.json", rms_norm_eps=-1)
    with pytest.raises(UserError) as raised:
        load_model(spoiled)
    expected = f"error: {raised.value}"
    out, text = tmp_path / "out.json", tmp_path / "answers.jsonl"
    text.write_text(json.dumps({"response": "one two"}) + "\n")
    answers = ("--answers", text)
    for main, *arguments in (
        (generate, "--target", spoiled, "--prompt", "one"),
        (generate, "--target", models.large, "--draft", spoiled, "--prompt", "one"),
        (calibrate, "--target", models.large, "--draft", spoiled, "--out", out),
        (trim, "--draft", spoiled, "--out", out, *answers),
    ):
        assert failing_run(main, monkeypatch, capsys, *arguments) == expected
    assert not out.exists()
