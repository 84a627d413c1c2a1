"""What each backend gets: the same arithmetic, written in the form that its compiler makes the best program of.

Nothing else asks which backend a program is for. A module that has several forms of something takes the one that `forms()`
names.
The forms of the CPU were measured; those of GPU and TPU are judged by what their compilers make of them (docs/lab/programs.md).
Random draws have one form for all: the distribution function is inverted, in blocks (`s2d_jax.sampling.draw`).
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp

# Up to how many rows of activations (None: any number), the form of `s2d_jax.model.products.forms`.
ProductForms = tuple[tuple[int | None, str], ...]


@dataclasses.dataclass(frozen=True)
class Forms:
    """The forms of one backend.

    Attributes:
        products: by weight format, the form of a product for up to so many rows.
        weight_gradient: how mixed-precision training computes the gradient of a weight: "contract_rows" is one product;
            "transposed_first" reads a transposed copy.
        beside_int8: the compute dtype beside int8 weights.
        keeps_dtype: a model that is loaded without a weight format keeps the dtype that it is stored in; otherwise it
            becomes f32.
        one_row_write: how a cache of one row is written: "plain" is one update; "behind_condition" hides it in a loop of
            one trip.
        unrolled_rows: up to how many rows of a cache are written one by one; more are written by a scatter.
        cache_layout: "chosen": XLA chooses in which order the axes of a cache lie in memory. "row_major": they stay in the
            order that they come in, and windows of up to `unrolled_rows` rows are read row by row.
        search_bits: how many bits of a filter's threshold are found in one pass over the probabilities.
        search: the passes are "unrolled" behind a condition, or a "loop" of no trips where no row filters.
        top_k: "blocks" searches the k blocks with the largest maxima only; "whole" is `jax.lax.top_k`.
        attention: the forms (`s2d_jax.model.attention_forms`) that are tried in a pass without a cache, in order; the first
            that takes what is asked for is used.
        cached_attention: the same for passes over a cache: decoding, verifying, and chunks of prompts.
        compiler_options: given to XLA with every program of a round.
        python_frames: up to how many Python frames an instruction of a program of a round says that it comes from. None: as
            JAX's configuration has it.
    """

    products: Mapping[str, ProductForms]
    weight_gradient: Literal["contract_rows", "transposed_first"]
    beside_int8: Any
    keeps_dtype: bool
    one_row_write: Literal["plain", "behind_condition"]
    unrolled_rows: int
    cache_layout: Literal["chosen", "row_major"]
    search_bits: int
    search: Literal["unrolled", "loop"]
    top_k: Literal["blocks", "whole"]
    attention: tuple[str, ...]
    cached_attention: tuple[str, ...]
    compiler_options: tuple[tuple[str, Any], ...] = ()
    python_frames: int | None = None


# Where a plain dot runs at the chip's speed, int8 values become numbers of the compute dtype on the way into it.
_PLAIN_DOTS = MappingProxyType(
    {"f32": ((None, "plain"),), "bf16": ((None, "plain"),), "int8": ((None, "scaled"),)}
)

CPU = Forms(
    products={
        # The library packs its second operand on every call, so up to 32 rows the weight comes first, behind a barrier that
        # keeps XLA from turning the product around. Above, a product is bound by arithmetic.
        "f32": ((32, "weight_first"), (None, "plain")),
        # Above 4 rows the library multiplies bf16 as it is. For one row it makes an f32 copy, and hoists that.
        "bf16": ((4, "blocked"), (None, "plain")),
        # Above 8 rows, two int8 digits per activation cost more arithmetic than converting the weights.
        "int8": ((8, "two_digits"), (None, "blocked")),
    },
    # The library does not multiply bf16 where a product contracts the first axis of its first operand.
    weight_gradient="transposed_first",
    beside_int8=jnp.float32,
    # Products of f32 run at the memory's limit; those of bf16 lose what they save (docs/experiments.md).
    keeps_dtype=False,
    # XLA would merge the write of an only row into each of its readers, and copy the cache for all but one of them.
    one_row_write="behind_condition",
    # A scatter is slower, but compiles sooner.
    unrolled_rows=16,
    cache_layout="chosen",
    # A pass over the vocabulary computes, so fewer comparisons are faster; and most requests need none.
    search_bits=1,
    search="loop",
    # A ninth of the time of `jax.lax.top_k`, inside a loop and with k = 10 of 49,152.
    top_k="blocks",
    # The kernels are for other chips, and the identity of greedy output is tested with these sums.
    attention=("dense",),
    cached_attention=("dense",),
)

GPU = Forms(
    products=_PLAIN_DOTS,
    weight_gradient="contract_rows",
    beside_int8=jnp.bfloat16,
    keeps_dtype=True,
    # The compiler copies no cache for it; the host would wait for the condition of a loop.
    one_row_write="plain",
    # A scatter is one kernel.
    unrolled_rows=1,
    cache_layout="chosen",
    # A pass is one kernel, and starting it costs more than 31 comparisons for each probability.
    search_bits=5,
    search="unrolled",
    # One kernel instead of several.
    top_k="whole",
    # For long rows, dense keeps scores in f32 for the gradient: 21 GB for 8,192 positions of 32 heads, against 0.4 GB.
    attention=("flash_gpu", "dense"),
    # "used_splits" stands ready. Nobody has timed it, and for one position its temporaries are twice those of dense.
    cached_attention=("dense",),
    compiler_options=(
        # The whole run is one command buffer, loops and conditions included: the host starts it once.
        (
            "xla_gpu_enable_command_buffer",
            "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,WHILE,CONDITIONAL",
        ),
        ("xla_gpu_graph_min_graph_size", 1),
        # Products of the same input stay apart. Merged, their weights would be put side by side anew in every round.
        ("xla_gpu_dot_merger_threshold_mb", 0),
    ),
)

TPU = Forms(
    products=_PLAIN_DOTS,
    weight_gradient="contract_rows",
    beside_int8=jnp.bfloat16,
    keeps_dtype=True,
    # With the layout below, the compiler copies no cache for a plain write.
    one_row_write="plain",
    # A scatter is a loop here.
    unrolled_rows=32,
    # A gather asks for an order of its own, and whole caches are copied between the two in every round.
    cache_layout="row_major",
    search_bits=5,
    search="unrolled",
    top_k="blocks",
    # A tenth of the bytes of dense at 2,048 positions of 32 heads, and an eightieth of its temporaries at 8,192.
    attention=("flash_tpu", "dense"),
    # "used_blocks" stands ready: it reads what is used, and copies no cache. Dense copies none either, and capacities grow
    # with the texts, so that most of a cache is in use; whether the kernel is faster must be measured on a chip.
    cached_attention=("dense",),
    # With any, libtpu 0.0.42 may compare the frames of calls inside of a loop without an end (StackFrames::IsPrefix, under
    # WhileLoopInvariantCodeMotion): drafting for one row in each group of a mesh did.
    python_frames=0,
)

BACKENDS = MappingProxyType({"cpu": CPU, "gpu": GPU, "tpu": TPU})

_compiling_for: contextvars.ContextVar[Forms | None] = contextvars.ContextVar("forms", default=None)


def forms() -> Forms:
    """The forms of the backend that a program is being traced for: that of `compiling_for`, or JAX's default backend."""
    return _compiling_for.get() or forms_of(jax.default_backend())


def forms_of(platform: str) -> Forms:
    """The forms of a platform, as JAX names it: "cpu", "gpu" (also "cuda" and "rocm"), "tpu"."""
    return BACKENDS["gpu" if platform in ("cuda", "rocm") else platform]


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Takes the forms of `platform` in the block.

    It stands inside of the function that is traced: JAX remembers what it has traced, whatever was said outside.
    """
    token = _compiling_for.set(forms_of(platform))
    try:
        yield
    finally:
        _compiling_for.reset(token)


def platform_of(mesh: jax.sharding.Mesh | None) -> str:
    """The platform of a mesh's devices, or of the default device: "cpu", "gpu", "tpu"."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def platform_of_arrays(arrays: Any) -> str:
    """The platform that the first array of a tree is on, or that it will be on if it is a `jax.ShapeDtypeStruct`."""
    sharding = jax.tree.leaves(arrays)[0].sharding
    return jax.default_backend() if sharding is None else next(iter(sharding.device_set)).platform
