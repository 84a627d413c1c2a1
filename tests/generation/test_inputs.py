"""What people give to a decoder: prompts in any form, sampling parameters or none, paths, arrays of other frameworks."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from noisy_pair import make_talking_decoder

from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.errors import UserError
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.weights.export import export_draft
from s2d_jax.weights.load import load_draft, load_model
from s2d_jax.weights.model import Draft
from s2d_jax.weights.prepare import prepare_for_decode

VOCAB = 300
IDS = [[5, 9, 2], [7, 7, 1, 3, 30, 12, 50]]
TALK = [{"role": "user", "content": "one two"}]
GREEDY = SamplingParams(max_new_tokens=40)
CONFIG = DecodeConfig(num_draft_tokens=3)


@pytest.fixture(scope="module")
def decoder() -> SpeculativeDecoder:
    return make_talking_decoder()


@pytest.mark.parametrize(
    "prompt", ["the quick", TALK, IDS[0], np.array(IDS[0]), jnp.array(IDS[0])], ids=type
)
def test_one_prompt_is_a_batch_of_one(decoder, prompt):
    one, many = decoder.generate(prompt, GREEDY), decoder.generate([prompt], GREEDY)
    assert len(one) == 1
    assert one.token_ids == many.token_ids
    assert one.text == one.texts[0] == many[0].text
    assert decoder.stream(prompt, GREEDY).finish().token_ids == one.token_ids
    assert decoder.conversation().generate(prompt, GREEDY).token_ids == one.token_ids
    with decoder.conversation().stream(prompt, GREEDY) as stream:
        assert stream.finish().token_ids == one.token_ids
    ids = decoder.encode(prompt)
    assert all(type(token) is int for token in ids)
    assert decoder.generate(ids, GREEDY).token_ids == one.token_ids


def test_kinds_of_prompts_mix_and_arrays_have_rows(decoder):
    mixed = decoder.generate(["the quick", IDS[0]], GREEDY)
    assert (
        mixed.token_ids == decoder.generate([decoder.encode("the quick"), IDS[0]], GREEDY).token_ids
    )
    rows = np.array([[5, 9, 2], [7, 7, 1]])
    assert (
        decoder.generate(rows, GREEDY).token_ids
        == decoder.generate(rows.tolist(), GREEDY).token_ids
    )
    with pytest.raises(UserError, match="2 prompts to encode; give one at a time"):
        decoder.encode(IDS)


@pytest.mark.parametrize("prompts", [None, 1.5, {"role": "user", "content": "x"}, b"x", [1, "x"]])
def test_what_is_no_prompt_is_refused(decoder, prompts):
    chat = decoder.conversation()
    calls = decoder.generate, decoder.stream, decoder.encode, chat.generate, chat.stream
    for call in calls:
        with pytest.raises(UserError, match="is no prompt; "):
            call(prompts)


def test_no_sampling_is_greedy_everywhere(decoder):
    default = SamplingParams()
    expected = decoder.generate(IDS, default).token_ids
    assert decoder.generate(IDS).token_ids == decoder.generate(IDS, None).token_ids == expected
    assert decoder.stream(IDS).finish().token_ids == expected
    assert decoder.conversation().generate(IDS).token_ids == expected
    chat, streamed = decoder.conversation(), decoder.conversation()
    answer = chat.ask("one two")
    assert answer.token_ids == decoder.generate(TALK, default).token_ids
    assert "".join(delta.text for delta in streamed.ask_stream("one two")) == answer.text
    assert decoder.warmup(buckets=(3,), batch_sizes=(2,)) > 0


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (
            {"temperature": 0.7, "top_k": 5},
            r"is no SamplingParams; write SamplingParams\(temperature=0.7, top_k=5\)$",
        ),
        (0.7, r"sampling=0.7 is no SamplingParams; write SamplingParams\(temperature=0.7\)$"),
        ("greedy", r"='greedy' is no SamplingParams; write SamplingParams\(temp.*, max_new"),
        ([GREEDY, None], "sampling=None is no SamplingParams; write"),
        (GREEDY.__class__, "is no SamplingParams; write"),
        ([GREEDY], "1 sampling parameters for 2 prompts; give one each, or one for all"),
    ],
)
def test_what_is_no_sampling_is_refused(decoder, sampling, message):
    chat = decoder.conversation()
    for call in (decoder.generate, decoder.stream, chat.generate, chat.stream):
        with pytest.raises(UserError, match=message) as caught:
            call(IDS, sampling)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="sampling"):
        decoder.warmup(batch_sizes=(2,), sampling=sampling if sampling != [GREEDY] else 3)


def test_numpy_parameters_are_put_on_the_device_once(decoder, tmp_path):
    def on_host(model):
        return dataclasses.replace(model, params=jax.device_get(model.params))

    target, draft = on_host(decoder.target), on_host(decoder.draft)
    for leaf in jax.tree.leaves(target.params):
        assert isinstance(leaf, np.ndarray)
    ours = SpeculativeDecoder(target, draft, CONFIG)
    _, _, (params, *_) = ours.prepare(IDS, GREEDY)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    _, _, (again, *_) = ours.prepare(IDS, GREEDY)
    same = jax.tree.map(lambda a, b: a is b, params, again)
    assert all(jax.tree.leaves(same))
    expected = decoder.generate(IDS, GREEDY)
    got = ours.generate(IDS, GREEDY)
    assert got.token_ids == expected.token_ids
    assert got.stats.seconds["compile"] == 0
    doubled = dataclasses.replace(target, params=jax.tree.map(np.float64, target.params))
    assert doubled.dtype == np.float32
    assert (
        SpeculativeDecoder(doubled, draft, CONFIG).generate(IDS, GREEDY).token_ids == got.token_ids
    )
    export_draft(draft, tmp_path / "draft", {})
    back = load_draft(tmp_path / "draft")
    jax.tree.map(np.testing.assert_array_equal, back.params, draft.params)
    small = prepare_for_decode(decoder.target, "int8")
    whole = SpeculativeDecoder(small).generate(IDS, GREEDY).token_ids
    assert SpeculativeDecoder(on_host(small)).generate(IDS, GREEDY).token_ids == whole


def test_paths_are_loaded(decoder, tmp_path):
    export_draft(decoder.draft, tmp_path / "draft", {})
    by_path = SpeculativeDecoder(str(tmp_path / "draft"), tmp_path / "draft", CONFIG)
    assert isinstance(by_path.draft, Draft)
    assert by_path.exits == (1, 2)
    loaded = load_model(tmp_path / "draft"), load_draft(tmp_path / "draft")
    expected = SpeculativeDecoder(*loaded, CONFIG).generate(IDS, GREEDY)
    assert by_path.generate(IDS, GREEDY).token_ids == expected.token_ids
    with pytest.raises(UserError, match="nowhere"):
        SpeculativeDecoder(tmp_path / "nowhere")
    with pytest.raises(
        UserError, match=r"target=3 \(int\) is no model; give a path, or what load_model"
    ):
        SpeculativeDecoder(3)
    with pytest.raises(
        UserError, match=r"draft=\{\} \(dict\) is no model; .* what load_draft returns"
    ):
        SpeculativeDecoder(decoder.target, {})
