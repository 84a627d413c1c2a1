"""Rounds of a target and a draft that are 7B wide, compiled for chips that this machine lacks, without weights."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from builtins import round as round_to
from typing import Any

import jax
import jax.numpy as jnp

from s2d_jax.compilers.collectives import collectives_by_axis
from s2d_jax.compilers.hlo import Instruction, Shape
from s2d_jax.compilers.products import product_flops
from s2d_jax.compilers.program import Program, read_program
from s2d_jax.compilers.reads import Taken, bytes_read
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
DRAFTED = DecodeConfig().num_draft_tokens


@dataclasses.dataclass(frozen=True)
class Round:
    """Which round is compiled, and for what.

    Attributes:
        chip: "h100" or "v5p".
        method: one of METHODS; "fixed" leaves at the first exit, "tree" at any.
        batch: rows.
        sampled: temperature 1 with top-k and top-p; else greedy.
        weight_format: of target and draft.
        devices: chips of the mesh.
        data: groups of chips, each of which decodes its part of the rows; the target is split over the chips of a group.
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
    data: int = 1

    @property
    def tensor(self) -> int:
        """Chips of a group, each of which has its part of the target."""
        return self.devices // self.data

    @property
    def left_at(self) -> tuple[int, ...]:
        """The exits at which tokens may leave."""
        if self.method == "plain":
            return (0,)
        return self.exits[:1] if self.method == "fixed" else self.exits

    @property
    def name(self) -> str:
        """A few words, for tables and the names of tests."""
        more = ["sampled"] * self.sampled + [self.weight_format] * (self.weight_format != "bf16")
        more += [f"{self.devices} devices"] * (self.devices > 1)
        more += [f"data {self.data}"] * (self.data > 1)
        more += [f"{self.layers} layers"] * (self.layers != 4)
        return " ".join([self.chip, self.method, f"batch {self.batch}", *more])


def decoder_of(round: Round) -> tuple[SpeculativeDecoder, SamplingParams]:
    """The decoder of a round, whose weights are shapes on devices that do not exist."""
    shape = MeshConfig(data=round.data, tensor=round.tensor)
    mesh = make_mesh(shape, _devices(round.chip)[: round.devices])
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


def row_of(round: Round) -> dict[str, Any]:
    """What the tables of compiled rounds say of a round; it takes seconds to minutes to compile."""
    program = compile_round(round)
    kept = {str(shape) for shape in _kept(program)}
    axes = {"data": round.data, "tensor": round.tensor}
    row = {
        "round": round.name,
        "loops": program.loops,
        "conditions": program.conditions,
        "kernels": program.kernels,
        "cache copies in a round": program.copies(kept, program.in_loop()),
        "cache copies in a call": program.copies(kept),
        "command buffers": program.command_buffers,
        "collectives": program.collectives,
        "collectives by axis": {
            axis: dict(sorted(kinds.items()))
            for axis, kinds in collectives_by_axis(program.hlo, axes).items()
        },
        "host transfers": program.host_transfers,
        "temporaries, MB": _mega(program.temporaries),
        "aliased, MB": _mega(program.aliased),
        "arguments, MB": _mega(program.arguments),
        "caches, MB": _mega(sum(shape.num_bytes for shape in _kept(program))),
        "products, GFLOP": round_to(
            product_flops(program.hlo, program.loop.called["body"]) / 1e9, 4
        ),
    }
    if round.method == "tree":  # how far the walk down it goes depends on the text
        return row
    reads = {}
    for exit in round.left_at:
        read = bytes_read(program.hlo, program.loop.called["body"], _taken(exit))
        least = least_bytes(round, _caches(program)[0].dims[2], exit)
        reads[str(exit)] = {"MB": _mega(read), "least, MB": _mega(least)}
    return row | {"reads": reads}


def least_bytes(round: Round, capacity: int, exit: int) -> int:
    """What a device must read in a round: its part of the target and of its caches once; for each drafted token the whole
    draft and its caches down to `exit`. Caches are those of its group's rows.

    Every exit on the way has to be read through the head, since its confidence decides.
    """
    c, per_weight = LLAMA2_7B, {"bf16": 2, "int8": 1}[round.weight_format]
    weights = per_weight * (4 * c.embed_dim * c.embed_dim + 3 * c.embed_dim * c.ffw_dim)
    rows = round.batch // round.data
    layer = weights + 2 * 2 * rows * capacity * c.embed_dim
    head = per_weight * c.vocab_size * c.embed_dim
    target = (round.layers * layer + head) // round.tensor
    if round.method == "plain":
        return target
    heads = 1 if round.method == "fixed" else sum(e <= exit for e in round.exits)
    return target + DRAFTED * (exit * layer + heads * head)


def _taken(exit: int) -> Taken:
    """How often each loop of a round runs, and which branches are taken, if every token leaves at `exit`."""

    def taken(instruction: Instruction) -> int:
        *_, scope, _ = instruction.op_name.split("/")
        if scope == "draft":
            return DRAFTED
        deepest = re.findall(r"exit_(\d+)", instruction.op_name)
        if scope.startswith("exit_") or instruction.opcode == "conditional":
            return int(not deepest or int(deepest[-1]) <= exit)
        return 1  # the loops that hide a write

    return taken


def _caches(program: Program) -> list[Shape]:
    """The K/V caches among the arguments of the program."""
    return [shape for shape in _kept(program) if len(shape.dims) == 4]


def _kept(program: Program) -> list[Shape]:
    """The caches, and the states at the exits `[B, C, D]`."""
    entry = program.hlo.computations[program.hlo.entry].instructions
    arguments = [i.shapes[0] for i in entry if i.opcode == "parameter"]
    return [shape for shape in arguments if len(shape.dims) >= 3 and shape.element == "bf16"]


def _mega(num_bytes: float) -> float:
    return round_to(num_bytes / 1e6, 1)


@functools.cache
def _devices(chip: str) -> list:
    return topology_devices({"h100": "h100:8", "v5p": "v5p:2x2x2"}[chip])


def _placed(x: jax.ShapeDtypeStruct, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _matrix() -> list[Round]:
    """Every method, batch, temperature, weight format and number of devices."""
    axes = METHODS, (1, 8, 32), (False, True), ("bf16", "int8"), (1, 8)
    return [Round(chip, *values) for chip in PLATFORMS for values in itertools.product(*axes)]


# LLaMA-2-7B with a draft of twelve layers.
WHOLE = [
    Round(chip, method, layers=32, exits=(6, 9, 12))
    for chip in PLATFORMS
    for method in ("plain", "fixed", "s2d", "tree")
]
# What the documentation shows.
SHOWN = [
    *(Round(chip, m, batch) for chip in PLATFORMS for batch in (1, 8) for m in METHODS),
    *(Round(chip, "fixed", 32) for chip in PLATFORMS),
    *(Round(chip, "s2d", sampled=True) for chip in PLATFORMS),
    *(Round(chip, "s2d", weight_format="int8") for chip in PLATFORMS),
    *(Round(chip, "s2d", 8, sampled=True, devices=8) for chip in PLATFORMS),
    *WHOLE,
]
# Rows, devices, groups of them: one row and eight on one chip, and the same eight on eight.
_LAID_OUT = ((1, 1, 1), (8, 1, 1), (8, 8, 8), (8, 8, 2), (8, 8, 1))
# The number says how many of these layouts.
_ON_MESHES = (
    ("h100", "plain", 5),
    ("h100", "s2d", 5),
    ("h100", "tree", 5),
    ("v5p", "plain", 5),
    ("v5p", "s2d", 5),
    ("v5p", "tree", 5),
)
MESHES = [
    *(
        Round(chip, method, batch, devices=devices, data=data)
        for chip, method, count in _ON_MESHES
        for batch, devices, data in _LAID_OUT[:count]
    ),
    *(
        Round(chip, "s2d", 8, sampled=True, devices=8, data=data)
        for chip, data in (("h100", 8), ("h100", 2), ("v5p", 8))
    ),
]
# What is compiled in every run of the tests.
QUICK = [
    *(Round("h100", method) for method in METHODS),
    Round("h100", "plain", layers=2),
    Round("h100", "fixed", 32, weight_format="int8"),
    Round("h100", "s2d", 8, sampled=True, devices=8),
    *(Round("v5p", method) for method in METHODS[:3]),
    Round("v5p", "plain", devices=8, layers=2),
    Round("v5p", "fixed", 8, devices=8),
    Round("h100", "plain", 8, devices=8, data=2, layers=2),
    Round("v5p", "fixed", 8, devices=8, data=8, layers=2),
]
ALL = list(dict.fromkeys([*QUICK, *SHOWN, *_matrix()]))
