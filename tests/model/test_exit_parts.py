"""Exits with a head or a residual adapter of their own: the definition in NumPy, HF torch, decoding, meshes, layer lists."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exported import MAX_ABS, VOCABULARY, exit_logits, files_in, hf_load, make_draft
from hf_tiny import expect_user_error, hf_logits, random_tokens
from reference_transformer import all_depths, logits
from tiny import adapted, noisy_draft, tiny_config, tiny_model, tiny_params, with_parts

from s2d_jax.calibration.record import record_trace
from s2d_jax.calibration.time_chains import draft_programs
from s2d_jax.calibration.timing import head_program
from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.draft import NO_PARTS, DraftConfig, ExitParts
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.model.exit_parts import exit_model, init_exit_parts
from s2d_jax.model.lora import LoraConfig, with_lora
from s2d_jax.model.params import abstract_params, logical_axes
from s2d_jax.model.products.weight_formats import Int8Weight
from s2d_jax.model.select_layers import selected, truncated
from s2d_jax.model.transformer import Transformer
from s2d_jax.sharding import MeshConfig, make_mesh, params_sharding
from s2d_jax.weights.export import exits_left_out, export_draft
from s2d_jax.weights.load import load_draft
from s2d_jax.weights.model import with_trimmed_head
from s2d_jax.weights.prepare import prepare_for_decode
from s2d_jax.weights.vocabulary import DraftVocabulary

PARTS = ExitParts(heads=(1, 4), adapters=(1, 2), adapter_rank=4)
HEADS = ExitParts(heads=(1, 4))
PROMPTS = [[5, 9, 2], [7, 7, 1, 3, 30, 12, 50], [33, 4, 21, 60, 2], [1]]
GREEDY = SamplingParams(max_new_tokens=30)
SAMPLED = SamplingParams(temperature=1.0, max_new_tokens=30)
LISTED = DraftVocabulary(np.delete(np.arange(64), [3, 16, 17, 40, 55]))
POLICIES = {
    "s2d": DecodeConfig(),
    "always first": DecodeConfig(exit_thresholds=(0.0, 0.0, 0.0)),
    "never early": DecodeConfig(exit_thresholds=(1.0, 1.0, 0.0)),
    "sd@2": DecodeConfig(exits=(2,)),
    "independent": DecodeConfig(exits=(4,)),
}


def _target(**changes):
    return tiny_model(num_layers=4, spread=14.0, **changes)


def _draft(target, parts=PARTS):
    return with_parts(noisy_draft(target, (1, 2, 4), (0.3, 0.3, 0.0)), parts)


@pytest.fixture(scope="module")
def target():
    return _target()


@pytest.fixture(scope="module")
def draft(target):
    return _draft(target)


def numpy_exit_logits(draft, state, exit_layer):
    """What DRAFTS.md's formula gives in f64: `h + up(silu(down(h / |h|))) * |h|`, the shared norm, the exit's head."""
    params, parts, config = draft.params, draft.draft_config.parts, draft.config
    if exit_layer in parts.adapters:
        adapter = params[f"exit_adapters_{exit_layer}"]
        down, up = (np.asarray(adapter[name]["kernel"], np.float64) for name in ("down", "up"))
        size = np.sqrt((state**2).mean(axis=-1, keepdims=True) + config.norm_eps)
        inner = state / size @ down.T
        state = state + inner / (1 + np.exp(-inner)) @ up.T * size
    if exit_layer not in parts.heads:
        return logits(config, params, state)
    untied = dataclasses.replace(config, tie_embeddings=False)
    return logits(untied, {**params, "lm_head": params[f"exit_heads_{exit_layer}"]}, state)


def read_exits(draft, states):
    """The logits that drafting reads from the state of each exit."""
    read = functools.partial(draft.drafting_transformer.apply, method="logits")

    @jax.jit
    def run(variables, states):
        return {exit: read(variables, h_TD, exit) for exit, h_TD in states.items()}

    return run({"params": draft.params}, states)


@pytest.mark.parametrize("tied", [False, True])
def test_every_exit_follows_the_definition(tied):
    draft = _draft(_target(tie_embeddings=tied))
    trimmed = with_trimmed_head(draft, LISTED)
    tokens = [5, 9, 2, 44]
    states, *_ = all_depths(draft.config, draft.params, tokens)
    read = {exit: jnp.asarray(states[exit], jnp.float32) for exit in (1, 2, 4)}
    whole, listed, shared = read_exits(draft, read), read_exits(trimmed, read), []
    for exit_layer in read:
        expected = numpy_exit_logits(draft, states[exit_layer], exit_layer)
        for found, ids in ((whole, np.arange(64)), (listed, LISTED.ids_U)):
            np.testing.assert_allclose(found[exit_layer], expected[:, ids], atol=2e-3, rtol=1e-4)
        plain = logits(draft.config, draft.params, states[exit_layer])
        shared.append(np.abs(expected - plain).max())
    assert min(shared) > 0.5  # the parts matter at every exit


@pytest.mark.parametrize("tied", [False, True])
def test_new_parts_change_nothing(tied):
    config = tiny_config(tie_embeddings=tied)
    params = tiny_params(config, spread=5.0)
    begun = init_exit_parts(config, params, PARTS, jax.random.key(0))
    model, h_TD = Transformer(config, parts=PARTS), jax.random.normal(jax.random.key(1), (5, 32))
    shared = Transformer(config).apply({"params": params}, h_TD, method="logits")
    for exit_layer in (None, 1, 2, 3, 4):
        found = model.apply({"params": begun}, h_TD, exit_layer, method="logits")
        np.testing.assert_array_equal(found, shared)
    downs = [begun[f"exit_adapters_{exit}"]["down"]["kernel"] for exit in (1, 2)]
    assert 0.01 < float(downs[0].std()) < 0.03
    assert not jnp.array_equal(*downs)
    # Training donates: a head must not share its memory with the shared one.
    head = params["embed"]["embedding"] if tied else params["lm_head"]["kernel"]
    pointers = {x.unsafe_buffer_pointer() for x in (head, begun["exit_heads_1"]["kernel"])}
    assert len(pointers) == 2


def test_shapes_and_axes_of_parts():
    config = tiny_config()
    begun = init_exit_parts(config, tiny_params(config), PARTS, jax.random.key(0))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), begun)
    assert abstract_params(config, jnp.float32, PARTS) == shapes
    axes = logical_axes(config, PARTS)
    assert axes["exit_heads_4"] == {"kernel": ("vocab", "embed")}
    assert axes["exit_adapters_2"] == {
        "down": {"kernel": ("rank", "embed")},
        "up": {"kernel": ("embed", "rank")},
    }
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    shardings = params_sharding(config, axes, mesh)
    split = jax.device_put(tiny_params(config), params_sharding(config, logical_axes(config), mesh))
    begun = init_exit_parts(config, split, PARTS, jax.random.key(0))
    assert jax.tree.map(lambda x: x.sharding, begun) == shardings


LESS = pytest.mark.exhaustive(
    "s2d with int8 and a list has all parts; other drafters are read apart"
)


@pytest.mark.parametrize(
    ("policy", "trimmed", "weight_format"),
    [
        ("s2d", True, "int8"),
        pytest.param("s2d", False, "f32", marks=LESS),
        pytest.param("sd@2", True, "bf16", marks=LESS),
        pytest.param("independent", False, "f32", marks=LESS),
        pytest.param(
            *("independent", False, "int8"),
            marks=pytest.mark.exhaustive("s2d has int8, and independent drafts have f32"),
        ),
    ],
)
def test_greedy_equals_the_width_matched_reference(target, draft, policy, trimmed, weight_format):
    if trimmed:
        draft = with_trimmed_head(draft, LISTED)
    draft = prepare_for_decode(draft, weight_format)
    decoder = SpeculativeDecoder(target, draft, POLICIES[policy])
    reference = SpeculativeDecoder(target, None, DecodeConfig(verify_width=decoder.verify_width))
    result = decoder.generate(PROMPTS, GREEDY)
    assert result.token_ids == reference.generate(PROMPTS, GREEDY).token_ids
    assert result.stats.accepted_tokens > 0
    assert policy != "s2d" or min(result.stats.exit_histogram.values()) > 0


def test_drafting_reads_the_parts(target, draft):
    """A head that always answers 7 drafts nothing else where its exit is used, and only there."""
    stubborn = jnp.zeros_like(draft.params["exit_heads_4"]["kernel"])
    with_h4 = {**draft.params, "exit_heads_4": {"kernel": stubborn}}
    broken = dataclasses.replace(draft, params=with_h4)
    for policy, changed in {
        "always first": False,
        "never early": True,
        "independent": True,
    }.items():
        accepted = [
            SpeculativeDecoder(target, model, POLICIES[policy])
            .generate(PROMPTS, GREEDY)
            .stats.accepted_tokens
            for model in (draft, broken)
        ]
        assert (accepted[0] != accepted[1]) == changed


def test_a_draft_as_target_reads_the_shared_head(draft):
    bare = {k: v for k, v in draft.params.items() if not k.startswith("exit_")}
    plain = dataclasses.replace(draft, params=bare, draft_config=DraftConfig((4,)))
    ids = [SpeculativeDecoder(m).generate(PROMPTS, GREEDY).token_ids for m in (plain, draft)]
    assert ids[0] == ids[1]


@pytest.mark.exhaustive(
    "test_decoding_over_data.py splits drafts without parts; axes of parts are above"
)
@pytest.mark.parametrize("data", [1, 2])
def test_tokens_beside_a_sharded_target_equal_those_of_one_device(data):
    """Both with LoRA on the trunk as well; the list's size, 59, divides by no mesh."""
    sampling = [GREEDY, SAMPLED, SAMPLED, SAMPLED]
    target = tiny_model(num_layers=2, spread=14.0, num_heads=8, num_kv_heads=8)
    lora, parts = LoraConfig(2, ("q_proj", "down_proj")), ExitParts((1,), (1, 2), 4)
    target = dataclasses.replace(target, params=adapted(target.params, lora))
    draft = with_parts(noisy_draft(target, (1, 2), (0.3, 0.0)), parts)
    policy = DecodeConfig(exits=(1, 2), num_draft_tokens=3)
    decoder = SpeculativeDecoder(target, with_trimmed_head(draft, LISTED), policy)
    one = decoder.generate(PROMPTS, sampling)
    mesh = make_mesh(MeshConfig(data=data, tensor=4))

    def shardings(model, parts):
        axes = with_lora(logical_axes(model.config, parts), lora)
        return params_sharding(model.config, axes, mesh)

    split_target, split_draft = (
        dataclasses.replace(model, params=jax.device_put(model.params, shardings(model, parts)))
        for model, parts in ((target, NO_PARTS), (draft, parts))
    )
    decoder = SpeculativeDecoder(split_target, with_trimmed_head(split_draft, LISTED), policy)
    many = decoder.generate(PROMPTS, sampling)
    assert many.token_ids == one.token_ids
    assert many.stats.exit_histogram == one.stats.exit_histogram


def test_calibration_records_what_the_parts_read(target, draft):
    """The trace's acceptance at T=0 is whether each exit's own argmax is the token that was emitted."""
    emitted = SpeculativeDecoder(target).generate(PROMPTS[:1], GREEDY).token_ids[0]
    sequence, start = [*PROMPTS[0], *emitted], len(PROMPTS[0]) + 1
    trace = record_trace(target, draft, [sequence], [len(PROMPTS[0])], 20, 0.0, lambda: None)
    states, *_ = all_depths(draft.config, draft.params, sequence)
    for row, exit_layer in enumerate((1, 2, 4)):
        found = numpy_exit_logits(draft, states[exit_layer], exit_layer).argmax(axis=-1)
        accepted = trace.answers[0].accepted[row]
        at = np.arange(start, start + len(accepted))
        np.testing.assert_array_equal(accepted, found[at - 1] == np.asarray(sequence)[at])


def test_costs_of_exits_with_parts_are_measured(target, draft):
    for program in (head_program(target, draft), *draft_programs(target, draft, (1, 2)).values()):
        assert program() > 0


@pytest.mark.parametrize(
    "name",
    [
        "llama tied",
        pytest.param("qwen2", marks=pytest.mark.exhaustive("test_export.py has every family")),
    ],
)
def test_own_heads_are_the_heads_of_exported_models(name, tmp_path):
    draft, out = with_parts(make_draft(name), HEADS), tmp_path / "out"
    export_draft(draft, out, {})
    tokens_BT = random_tokens(VOCABULARY)
    directories = {1: out / "exit_01", 2: out / "exit_02", 4: out / "exit_04"}
    assert {path.name for path in out.glob("exit_*")} == {
        *(path.name for path in directories.values()),
        "exit_parts.safetensors",
    }
    ours = exit_logits(draft, (1, 2, 4, None), tokens_BT)
    for depth, directory in directories.items():
        theirs = hf_logits(hf_load(directory), tokens_BT)
        assert np.abs(ours[depth] - theirs).max() <= MAX_ABS
    shared = hf_logits(hf_load(out), tokens_BT)
    assert np.abs(shared - ours[None]).max() <= MAX_ABS
    assert np.abs(shared - hf_logits(hf_load(out / "exit_04"), tokens_BT)).max() > 0.1


@pytest.mark.parametrize(
    "trimmed",
    [pytest.param(False, marks=pytest.mark.exhaustive("the same files without a list")), True],
)
def test_an_export_with_parts_reads_back_equal(trimmed, tmp_path):
    draft = with_parts(make_draft("llama tied"), PARTS)
    if trimmed:
        draft = with_trimmed_head(draft, LISTED)
    export_draft(draft, tmp_path / "out", {})
    assert exits_left_out(draft) == (1, 2)
    assert {p.name for p in (tmp_path / "out").glob("exit_*/")} == {"exit_04"}
    loaded = load_draft(tmp_path / "out")
    assert loaded.draft_config == draft.draft_config
    jax.tree.map(np.testing.assert_array_equal, loaded.params, draft.params)
    int8 = load_draft(tmp_path / "out", weight_format="int8")
    assert isinstance(int8.params["exit_heads_1"]["kernel"], Int8Weight)
    prepared = prepare_for_decode(draft, "int8").params
    jax.tree.map(np.testing.assert_array_equal, int8.params, prepared)
    mesh = make_mesh(MeshConfig(fsdp=2))
    split = load_draft(tmp_path / "out", mesh=mesh)
    axes = logical_axes(draft.config, PARTS)
    expected = params_sharding(draft.config, axes, mesh)
    assert {k: jax.tree.map(lambda x: x.sharding, split.params[k]) for k in expected} == expected


def test_a_lost_file_of_parts_is_told(tmp_path):
    export_draft(with_parts(make_draft("llama tied"), HEADS), tmp_path / "out", {})
    (tmp_path / "out" / "exit_parts.safetensors").unlink()
    assert files_in(tmp_path / "out")
    with expect_user_error("exit_parts.safetensors does not exist, but sorted_draft.json names"):
        load_draft(tmp_path / "out")


def test_an_exit_with_an_adapter_is_no_plain_model(draft):
    with expect_user_error("exit 2 has a residual adapter, which no plain model has; take an exit"):
        exit_model(draft.config, draft.params, PARTS, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": (2, 1)}, r"heads=\(2, 1\) of the exit parts must be ascending positive layer"),
        ({"adapters": (0,), "adapter_rank": 4}, r"adapters=\(0,\) of the exit parts must be"),
        ({"adapters": (1,)}, r"adapter_rank=0 with adapters=\(1,\); give at least 1"),
        ({"adapter_rank": 4}, r"adapter_rank=4 with adapters=\(\); give at least 1"),
    ],
)
def test_parts_that_cannot_be(fields, message):
    with expect_user_error(message):
        ExitParts(**fields)


def test_parts_of_no_exit():
    with expect_user_error(r"exit parts at \[3\], but exit_layers=\(1, 2\); add those exits"):
        DraftConfig((1, 2), parts=ExitParts((1, 3)))


def test_any_list_of_layers_is_a_model():
    config = tiny_config()
    params = tiny_params(config, spread=5.0)
    states = {}
    for layers in ((3, 0, 2), (0, 1)):
        chosen_config, chosen = selected(config, params, layers)
        assert chosen_config.num_layers == len(layers)
        renamed = {f"layers_{new}": params[f"layers_{old}"] for new, old in enumerate(layers)}
        expected, *_ = all_depths(chosen_config, {**params, **renamed}, [5, 9, 2])
        model = Transformer(chosen_config)
        tokens = jnp.array([[5, 9, 2]])
        read = functools.partial(model.apply, exit_layers=(len(layers),), method="exit_hiddens")
        (found,) = jax.jit(read)({"params": chosen}, tokens)
        np.testing.assert_allclose(found[0], expected[-1], atol=1e-3)
        assert set(chosen) == {"embed", "final_norm", "lm_head", *renamed}
        states[layers] = found
    first = truncated(config, params, 2)
    jax.tree.map(np.testing.assert_array_equal, first[1], chosen)
    for layers, message in {
        (): "there are no layers; list some of 0 to 3",
        (0, 4): "layer 4 is not in the model; list some of 0 to 3",
        (1, 1): "repeats a layer; list each at most once",
    }.items():
        with expect_user_error(message):
            selected(config, params, layers)
