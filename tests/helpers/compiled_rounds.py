"""Rounds of a target and a draft that are 7B wide, compiled for chips that this machine lacks, without weights."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from s2d_jax.compilers.program import Program, read_program
from s2d_jax.compilers.topologies import topology_devices
from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.draft import DraftConfig
from s2d_jax.config.model import ModelConfig
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.config.tree import TreeShape
from s2d_jax.decode.programs import lower_run
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.model.params import abstract_params, logical_axes
from s2d_jax.sharding import MeshConfig, make_mesh, params_sharding, replicated
from s2d_jax.weights.model import Draft, Model
from s2d_jax.weights.prepare import prepare_for_decode

LLAMA2_7B = ModelConfig(
    *("llama", 32_000, 4096, 11_008, 32, 32, 32, 128, 1e-5, 10_000.0, 4096),
    eos_token_ids=(2,),
)
TREE = TreeShape(depth=4, top_k=4, nodes=16)
METHODS = ("plain", "fixed", "s2d", "tree")
PLATFORMS = {"h100": "gpu", "v5p": "tpu"}


@dataclasses.dataclass(frozen=True)
class Round:
    """Which round is compiled, and for what.

    Attributes:
        chip: "h100" or "v5p".
        method: one of METHODS; "fixed" leaves at the first exit, "tree" at any.
        batch: rows.
        sampled: temperature 1 with top-k and top-p; else greedy.
        weight_format: of target and draft.
        devices: chips that the target is split over.
        layers: of the target.
        exits: of the draft; the last is its depth.
        new_tokens: how many are asked for, which the caches' capacity follows.
    """

    chip: str
    method: str
    batch: int = 1
    sampled: bool = False
    weight_format: str = "bf16"
    devices: int = 1
    layers: int = 4
    exits: tuple[int, ...] = (2, 3, 4)
    new_tokens: int = 128

    @property
    def name(self) -> str:
        """A few words, for tables and the names of tests."""
        more = ["sampled"] * self.sampled + [self.weight_format] * (self.weight_format != "bf16")
        more += [f"{self.devices} devices"] * (self.devices > 1)
        more += [f"{self.layers} layers"] * (self.layers != 4)
        return " ".join([self.chip, self.method, f"batch {self.batch}", *more])


def decoder_of(round: Round) -> tuple[SpeculativeDecoder, SamplingParams]:
    """The decoder of a round, whose weights are shapes on devices that do not exist."""
    mesh = make_mesh(MeshConfig(tensor=round.devices), _devices(round.chip)[: round.devices])
    config = dataclasses.replace(LLAMA2_7B, num_layers=round.layers)
    shardings = params_sharding(config, logical_axes(config), mesh)
    shapes = abstract_params(config, jnp.bfloat16)
    target = prepare_for_decode(
        Model(config, jax.tree.map(_placed, shapes, shardings), None, "7B wide"),
        round.weight_format,
    )
    draft = None
    if round.method != "plain":
        config = dataclasses.replace(LLAMA2_7B, num_layers=round.exits[-1])
        whole = replicated(mesh)
        shapes = jax.tree.map(lambda x: _placed(x, whole), abstract_params(config, jnp.bfloat16))
        draft = Draft(config, shapes, None, "draft", DraftConfig(round.exits))
        draft = prepare_for_decode(draft, round.weight_format)
    settings = {"fixed": {"exits": round.exits[:1]}, "tree": {"tree": TREE}}.get(round.method, {})
    filters = {"temperature": 1.0, "top_k": 50, "top_p": 0.9} if round.sampled else {}
    sampling = SamplingParams(max_new_tokens=round.new_tokens, **filters)
    return SpeculativeDecoder(target, draft, DecodeConfig(**settings)), sampling


def compile_round(round: Round) -> Program:
    """The loop of rounds, compiled."""
    decoder, sampling = decoder_of(round)
    lowered = lower_run(*decoder.prepare([[1] * 100] * round.batch, sampling))
    return read_program(lowered, PLATFORMS[round.chip])


@functools.cache
def _devices(chip: str) -> list:
    return topology_devices({"h100": "h100:8", "v5p": "v5p:2x2x2"}[chip])


def _placed(x: jax.ShapeDtypeStruct, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
