"""A target split over a tensor axis decodes the same tokens, and the same round compiles for real TPU topologies."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chips_elsewhere import chips
from compiled_rounds import LLAMA2_7B
from jax.sharding import NamedSharding, PartitionSpec
from split_pair import check_next_turn, noisy_draft, split, tiny_target
from tiny import tiny_config

from s2d_jax.compilers.collectives import count_collectives
from s2d_jax.compilers.hlo import parse_hlo
from s2d_jax.config.draft import DraftConfig
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.decode.programs import programs
from s2d_jax.errors import UserError
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.model.params import abstract_params, logical_axes
from s2d_jax.model.products.weight_formats import embed
from s2d_jax.sharding import MeshConfig, make_mesh, params_sharding, split_over
from s2d_jax.weights.model import Draft, Model
from s2d_jax.weights.prepare import prepare_for_decode

PROMPTS = [[5, 9, 2], [7, 7, 1, 3, 30, 12, 50]]


@pytest.fixture(scope="module")
def target() -> Model:
    return tiny_target()


@pytest.fixture(scope="module")
def draft(target) -> Draft:
    return noisy_draft(target)


OTHERS = pytest.mark.exhaustive(
    "either size is in the rest; test_decoding_over_data.py has samples"
)


@pytest.mark.parametrize(
    ("use_draft", "temperature", "tensor"),
    [
        (True, 0.0, 8),
        (False, 0.0, 2),
        pytest.param(True, 1.0, 2, marks=OTHERS),
        pytest.param(True, 0.0, 2, marks=OTHERS),
        pytest.param(True, 1.0, 8, marks=OTHERS),
        pytest.param(False, 0.0, 8, marks=OTHERS),
        pytest.param(False, 1.0, 2, marks=OTHERS),
        pytest.param(False, 1.0, 8, marks=OTHERS),
    ],
)
def test_tokens_equal_those_of_one_device(target, draft, tensor, temperature, use_draft):
    drafting = draft if use_draft else None
    sampling = SamplingParams(temperature=temperature, max_new_tokens=30)
    one = SpeculativeDecoder(target, drafting).generate(PROMPTS, sampling)
    mesh = make_mesh(MeshConfig(tensor=tensor))
    many = SpeculativeDecoder(split(target, mesh), drafting).generate(PROMPTS, sampling)
    assert many.token_ids == one.token_ids
    assert many.stats.exit_histogram == one.stats.exit_histogram
    assert [row.drafted_by for row in many] == [row.drafted_by for row in one]


def test_logits_and_scores_equal_those_of_one_device(target):
    many = split(target, make_mesh(MeshConfig(tensor=8)))
    close = {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(many.logits(PROMPTS[0]), target.logits(PROMPTS[0]), **close)
    (ours,), (expected,) = many.score(PROMPTS[0]), target.score(PROMPTS[0])
    np.testing.assert_allclose(ours.log_probs, expected.log_probs, **close)


@pytest.mark.exhaustive("test_decoding_over_data.py has the same with rows split as well")
def test_caches_of_a_sharded_target_grow_and_serve_the_next_turn(target, draft):
    check_next_turn(target, draft, make_mesh(MeshConfig(tensor=8)), PROMPTS)


def test_the_cache_is_split_on_heads_and_never_gathered(target, draft):
    mesh = make_mesh(MeshConfig(tensor=8))
    decoder = SpeculativeDecoder(split(target, mesh), draft)
    static, width, args = decoder.prepare(PROMPTS, SamplingParams(max_new_tokens=30))
    (prefill, run), _ = programs(static, width, args)
    cache = prefill.output_shardings.target_cache
    assert all(s.spec[1] == "tensor" for s in (*cache.keys, *cache.values))
    c, text = target.config, run.as_text()
    assert f"f32[2,1,128,{c.head_dim}]" in text  # one of eight heads a device
    target_gathers = re.findall(rf"= f32\[2,8,128,{c.head_dim}\]\S* all-gather", text)
    assert not target_gathers


@pytest.mark.usefixtures("compiled_anew")
@pytest.mark.parametrize("topology", ["h100:8", "v5p:2x2x2"])
def test_an_embedding_table_is_not_gathered_to_look_up_a_token(topology):
    """To look up a single row is to take a slice, for which XLA would send the table of every GPU to every other."""
    mesh = make_mesh(MeshConfig(tensor=8), chips(topology))

    def look_up(table_VD, ids):
        with split_over(mesh):
            return embed(table_VD, ids)

    rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("tensor",), ()))
    table_VD = jax.ShapeDtypeStruct((512, 256), jnp.bfloat16, sharding=rows)
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32, sharding=whole)
    compiled = jax.jit(look_up).lower(table_VD, ids).compile()
    assert set(count_collectives(parse_hlo(compiled.as_text()))) == {"all-reduce"}


def test_heads_that_do_not_divide_are_refused():
    config = tiny_config(num_heads=6, num_kv_heads=3)
    with pytest.raises(UserError, match=r"num_heads=6 does not divide by mesh axis tensor=8"):
        params_sharding(config, logical_axes(config), make_mesh(MeshConfig(tensor=8)))


def test_a_mesh_of_too_many_devices_is_refused():
    with pytest.raises(UserError, match=r"needs 16 devices, 8 are present; make an axis smaller"):
        make_mesh(MeshConfig(tensor=16))


@pytest.fixture
def tpu_mesh():
    """Eight chips of a v5p slice, known to the compiler only."""
    return make_mesh(MeshConfig(tensor=8), chips("v5p:2x2x2"))


MINUTES = pytest.mark.exhaustive("a minute to compile; test_compiled_rounds has smaller rounds")


@MINUTES
def test_llama2_7b_compiles_for_a_v5p_topology(tpu_mesh):
    """The jitted round of a LLaMA-2-7B target with a 12-layer sorted draft, ahead of time, without weights."""

    shardings = params_sharding(LLAMA2_7B, logical_axes(LLAMA2_7B), tpu_mesh)
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        *(abstract_params(LLAMA2_7B, jnp.bfloat16), shardings),
    )
    target = Model(LLAMA2_7B, params, None, "LLaMA-2-7B")
    draft_config = dataclasses.replace(LLAMA2_7B, num_layers=12)
    draft_params = abstract_params(draft_config, jnp.bfloat16)
    draft = Draft(draft_config, draft_params, None, "draft", DraftConfig((6, 9, 12)))
    decoder = SpeculativeDecoder(target, draft)
    (_, run), _ = programs(*decoder.prepare([[1] * 100], SamplingParams(max_new_tokens=128)))

    text = run.as_text()
    assert "all-reduce" in text
    memory = run.memory_analysis()
    weights = sum(np.prod(x.shape) * 2 for x in jax.tree.leaves(params)) / 8
    assert weights < memory.argument_size_in_bytes < 95e9
    assert memory.temp_size_in_bytes < 1e9


@MINUTES
@pytest.mark.parametrize("weight_format", ["bf16", "int8"])
def test_weight_formats_compile_for_a_v5p_topology(tpu_mesh, weight_format):
    """The round of a few wide layers: plain dots on sharded weights, and no second copy of them in another type."""
    config = dataclasses.replace(LLAMA2_7B, num_layers=4)
    shardings = params_sharding(config, logical_axes(config), tpu_mesh)
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        *(abstract_params(config, jnp.bfloat16), shardings),
    )
    target = prepare_for_decode(Model(config, params, None, "LLaMA-2"), weight_format)
    draft_config = dataclasses.replace(config, num_layers=2)
    draft = Model(draft_config, abstract_params(draft_config, jnp.bfloat16), None, "draft")
    assert target.dtype == jnp.bfloat16
    decoder = SpeculativeDecoder(target, draft)
    (_, run), _ = programs(*decoder.prepare([[1] * 100], SamplingParams(max_new_tokens=128)))

    text, memory = run.as_text(), run.memory_analysis()
    assert "all-reduce" in text
    kernel = {"bf16": "bf16", "int8": "s8"}[weight_format] + "[1376,4096]"
    assert kernel in text  # an eighth of up_proj
    weights = sum(np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(target.params)) / 8
    print(
        f"{weight_format}: weights {weights / 1e6:.0f} MB, temp {memory.temp_size_in_bytes / 1e6:.0f} MB"
    )
    assert memory.temp_size_in_bytes < weights / 2
