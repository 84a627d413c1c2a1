"""Rows split over the data axis: the tokens of one device, with nothing sent between the groups."""

from __future__ import annotations

import functools
import re

import jax
import numpy as np
import pytest
from split_pair import check_next_turn, noisy_draft, split, tiny_target

from s2d_jax.compilers.collectives import count_collectives
from s2d_jax.compilers.hlo import parse_hlo
from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.config.tree import TreeShape
from s2d_jax.decode.programs import prefill_program, programs, state_shapes
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.generation.policy import PolicyKey
from s2d_jax.sharding import MeshConfig, make_mesh

PROMPTS = [[5, 9, 2], [7, 7, 1, 3, 30, 12, 50], [4], [8, 8], [1, 2, 3, 4, 5, 6, 7, 8, 9], [20, 21]]
CONFIGS = {"chain": DecodeConfig(), "tree": DecodeConfig(tree=TreeShape(depth=3, top_k=3, nodes=8))}
OTHERS = functools.partial(
    pytest.param, marks=pytest.mark.exhaustive("each value of every axis is in the rest")
)
BOTH_AXES = pytest.mark.exhaustive("a split draft is tested on both axes, the others on each")


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def draft(target):
    return noisy_draft(target)


def _mesh(data: int, tensor: int):
    return make_mesh(MeshConfig(data=data, tensor=tensor))


@pytest.mark.parametrize(
    ("method", "temperature", "data", "tensor"),
    [
        ("chain", 1.0, 8, 1),
        pytest.param("chain", 0.0, 2, 4, marks=BOTH_AXES),
        OTHERS("tree", 0.0, 8, 1),
        OTHERS("tree", 1.0, 8, 1),
        OTHERS("tree", 0.0, 2, 4),
        OTHERS("tree", 1.0, 2, 4),
        OTHERS("chain", 0.0, 8, 1),
        OTHERS("chain", 1.0, 2, 4),
    ],
)
def test_tokens_equal_those_of_one_device(target, draft, method, temperature, data, tensor):
    """Six prompts: two groups have three each; of eight groups two have none."""
    sampling = SamplingParams(temperature=temperature, max_new_tokens=16)
    one = SpeculativeDecoder(target, draft, CONFIGS[method]).generate(PROMPTS, sampling)
    decoder = SpeculativeDecoder(split(target, _mesh(data, tensor)), draft, CONFIGS[method])
    many = decoder.generate(PROMPTS, sampling)
    assert many.token_ids == one.token_ids
    assert many.finish_reasons == one.finish_reasons
    assert [row.drafted_by for row in many] == [row.drafted_by for row in one]
    assert many.stats.target_forwards == one.stats.target_forwards
    # Each group runs the draft for itself.
    assert many.stats.draft_forwards[2] >= one.stats.draft_forwards[2]


@pytest.mark.parametrize(
    ("method", "temperature", "data", "tensor"),
    [
        ("chain", 1.0, 2, 4),
        OTHERS("chain", 0.0, 2, 4),
        OTHERS("chain", 0.0, 1, 8),
        OTHERS("chain", 1.0, 1, 8),
        OTHERS("tree", 0.0, 2, 4),
        OTHERS("tree", 1.0, 2, 4),
        OTHERS("tree", 0.0, 1, 8),
        OTHERS("tree", 1.0, 1, 8),
    ],
)
def test_a_split_draft_drafts_the_tokens_of_one_device(
    target, draft, method, temperature, data, tensor
):
    sampling = SamplingParams(temperature=temperature, max_new_tokens=16)
    one = SpeculativeDecoder(target, draft, CONFIGS[method]).generate(PROMPTS, sampling)
    mesh = _mesh(data, tensor)
    decoder = SpeculativeDecoder(split(target, mesh), split(draft, mesh), CONFIGS[method])
    static, width, args = decoder.prepare(PROMPTS, sampling)
    (prefill, run), _ = programs(static, width, args)
    if data > 1:  # before it runs, since groups that wait for each other do not end
        _check_sent_within_groups(run.as_text(), mesh)
    many = decoder.generate(PROMPTS, sampling)
    assert many.token_ids == one.token_ids
    assert [row.drafted_by for row in many] == [row.drafted_by for row in one]
    heads = target.config.num_kv_heads
    for cache in prefill(*args).draft_state.segments:
        for array in (*cache.keys, *cache.values):
            assert array.addressable_shards[0].data.shape[1] == heads // tensor


@pytest.mark.parametrize(
    ("method", "data", "tensor", "how"),
    [
        ("chain", 2, 4, "split"),
        ("chain", 8, 1, "whole"),
        OTHERS("chain", 2, 4, "whole"),
        OTHERS("tree", 8, 1, "whole"),
        OTHERS("tree", 2, 4, "split"),
    ],
)
def test_a_state_lies_where_it_was_said_before_anything_is_compiled(
    target, draft, method, data, tensor, how
):
    mesh = _mesh(data, tensor)
    drafting = split(draft, mesh) if how == "split" else draft
    decoder = SpeculativeDecoder(split(target, mesh), drafting, CONFIGS[method])
    sampling = SamplingParams(temperature=1.0, max_new_tokens=16)
    static, width, args = decoder.prepare(PROMPTS, sampling)
    said, (_, found, _) = state_shapes(static, width, args), prefill_program(static, width, args)
    assert jax.tree.structure(said) == jax.tree.structure(found)
    for ours, expected in zip(jax.tree.leaves(said), jax.tree.leaves(found), strict=True):
        assert (ours.shape, ours.dtype) == (expected.shape, expected.dtype)
        assert ours.sharding.is_equivalent_to(expected.sharding, len(ours.shape))


def test_caches_grow_and_serve_the_next_turn(target, draft):
    """Three prompts over two groups, so a row that nobody asked for grows and goes on as well."""
    check_next_turn(target, draft, _mesh(2, 1), PROMPTS[:3])


@pytest.mark.exhaustive("streams of one device and rows of a mesh are tested apart")
def test_a_stream_and_timed_rounds_give_the_same_tokens(target, draft):
    decoder = SpeculativeDecoder(split(target, _mesh(2, 1)), draft)
    sampling = SamplingParams(max_new_tokens=16)
    whole = decoder.generate(PROMPTS[:3], sampling)
    with decoder.stream(PROMPTS[:3], sampling, rounds_per_look=2) as stream:
        rows = [[token for d in deltas for token in d.token_ids] for deltas in _by_row(stream, 3)]
    assert rows == whole.token_ids
    timed = decoder.generate(PROMPTS[:3], sampling, time_rounds=True)
    assert timed.token_ids == whole.token_ids


def _by_row(stream, rows: int) -> list[list]:
    deltas = list(stream)
    return [[delta for delta in deltas if delta.row == row] for row in range(rows)]


def test_groups_hold_and_compute_their_own_rows_and_send_nothing(target, draft):
    sampling = SamplingParams(max_new_tokens=16)

    def compiled(model, rows):
        static, width, args = SpeculativeDecoder(model, draft).prepare([[5, 9]] * rows, sampling)
        return programs(static, width, args)[0], args

    (prefill, run), args = compiled(split(target, _mesh(8, 1)), 8)
    state = prefill(*args)
    for cache in (state.target_cache, *state.draft_state.segments):
        for array in (*cache.keys, *cache.values):
            assert array.addressable_shards[0].data.nbytes * 8 == array.nbytes
    assert state.tokens_BC.addressable_shards[0].data.shape[0] == 1
    assert count_collectives(parse_hlo(run.as_text())) == {}
    # A group computes what one device computes for one row.
    (_, alone), _ = compiled(target, 1)
    flops = run.cost_analysis()["flops"]
    assert flops == pytest.approx(alone.cost_analysis()["flops"], rel=0.01)


def test_a_split_target_sends_over_the_tensor_axis_only(target, draft):
    mesh = _mesh(2, 4)
    static, width, args = SpeculativeDecoder(split(target, mesh), draft).prepare(
        [[5, 9]] * 8, SamplingParams(max_new_tokens=16)
    )
    (_, run), _ = programs(static, width, args)
    _check_sent_within_groups(run.as_text(), mesh)


def _check_sent_within_groups(text: str, mesh) -> None:
    """Groups have different numbers of rounds, so none may wait for another in a round."""
    numbers = [[int(device.id) for device in row.flatten()] for row in mesh.devices]
    groups = _groups_that_send(text)
    assert groups
    assert all(any(set(group) <= set(row) for row in numbers) for group in groups)
    # XLA takes all devices together for it, whatever pairs it names.
    assert "collective-permute" not in text


def _groups_that_send(text: str) -> list[list[int]]:
    """The devices of each collective; `[2,4]<=[8]` are the numbers up to 8, in two rows of four."""
    found = []
    for shape, of, order in re.findall(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text
    ):
        numbers = np.arange(jax.device_count()).reshape(_numbers(of))
        numbers = numbers.transpose(_numbers(order)) if order else numbers
        found += numbers.reshape(_numbers(shape)).tolist()
    assert text.count("replica_groups=") == text.count("replica_groups=["), "written in another way"
    return found


def _numbers(listed: str) -> list[int]:
    return [int(number) for number in listed.split(",")]


def test_a_policy_is_of_one_mesh(target, draft):
    meshes = {
        "": None,
        "data 8": _mesh(8, 1),
        "tensor 8": _mesh(1, 8),
        "data 2, tensor 4": _mesh(2, 4),
    }
    models = [target if mesh is None else split(target, mesh) for mesh in meshes.values()]
    keys = [PolicyKey.of(model, draft, 0.0) for model in models]
    kind = keys[0].device
    assert [key.device for key in keys] == [kind, *(f"{kind}, {name}" for name in list(meshes)[1:])]
    assert len({key.target for key in keys}) == 1
