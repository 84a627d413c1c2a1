"""Times every form of a product inside a real loop: `python -m infer.bench --kernels [--target MODEL] --out DIR`."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from infer.bench.kernel_report import show_kernels, write_kernels
from s2d_jax.backends import forms_of, platform_of
from s2d_jax.cli.command import say_devices
from s2d_jax.cli.environment import environment
from s2d_jax.cli.screen import counting_bar, eta, screen
from s2d_jax.config.model import ModelConfig
from s2d_jax.errors import UserError
from s2d_jax.machine import usable_cores
from s2d_jax.model.products import forms as product_forms
from s2d_jax.model.products.linear import Form, form_of
from s2d_jax.model.products.weight_formats import (
    WEIGHT_FORMATS,
    compute_dtype,
    quantise,
    weight_bytes,
)
from s2d_jax.weights.load import read_description

ROWS = (1, 2, 4, 8, 16, 32)
_REPEATS, _TRIPS = 3, 2
# The weights' bytes in int8, the smallest format: several times a usual last-level cache.
_SMALLEST_BYTES = 96 << 20
# Each layer is four products to compile; SmolLM2-135M needs 41.
_MOST_LAYERS = 256
_DEFAULT_DIMS = (
    1536,
    1536,
    8960,
)  # embedding, attention heads together, hidden units: Qwen2.5-1.5B


@dataclasses.dataclass(frozen=True)
class TimedForm:
    """A form to time. New ones are added to `FORMS`; the function is what `linear` would call."""

    weight_format: str
    name: str
    form: Form


def _tied(form: Form) -> Form:
    """The form with its weight tied to the activations, so that XLA can hoist nothing out of the loop."""

    def tied(x_AI, w):
        return form(*jax.lax.optimization_barrier((x_AI, w)))

    return tied


def _weight_first_no_barrier(x_AI, w_OI):
    contract = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(w_OI, x_AI, contract, preferred_element_type=jnp.float32).T


FORMS = (
    TimedForm("f32", "x first", product_forms.plain),
    TimedForm("f32", "weight first", _weight_first_no_barrier),
    TimedForm("f32", "weight first, barrier", product_forms.weight_first),
    TimedForm("bf16", "x first", product_forms.plain),
    TimedForm("bf16", "x first, tied", _tied(product_forms.plain)),
    TimedForm("bf16", "weight first, barrier", product_forms.weight_first),
    TimedForm("bf16", "weight first, tied", _tied(product_forms.weight_first)),
    TimedForm("bf16", "blocks to f32", product_forms.blocked),
    TimedForm("int8", "to f32, x first", product_forms.scaled),
    TimedForm("int8", "to f32, x first, tied", _tied(product_forms.scaled)),
    TimedForm("int8", "blocks to f32", product_forms.blocked),
    TimedForm("int8", "two int8 digits", product_forms.two_digits),
)


@dataclasses.dataclass(frozen=True)
class Chain:
    """The products of a few layers, one after another.

    Attributes:
        dims: embedding, attention heads together, hidden units.
        num_layers: how many times the products `embed -> heads -> embed -> hidden -> embed` are run.
    """

    dims: tuple[int, int, int]
    num_layers: int

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """`[out, in]` of every product, in order."""
        embed, heads, hidden = self.dims
        each = [(heads, embed), (embed, heads), (hidden, embed), (embed, hidden)]
        return each * self.num_layers


def chain_of(config: ModelConfig | None) -> Chain:
    """The fewest layers of a model whose int8 weights are far larger than the last-level cache.

    Raises:
        UserError: if these are so many that compiling them would take hours.
    """
    dims = _DEFAULT_DIMS
    if config is not None:
        dims = (config.embed_dim, config.num_heads * config.head_dim, config.ffw_dim)
    one = Chain(dims, 1)
    layer_bytes = sum(out * columns for out, columns in one.shapes)
    num_layers = -(-_SMALLEST_BYTES // layer_bytes)
    if num_layers > _MOST_LAYERS:
        raise UserError(
            f"the model's layers have {layer_bytes:,} weights, so {num_layers:,} of them would have to be compiled to leave "
            "the caches; time a larger model, or leave --target out"
        )
    return Chain(dims, num_layers)


def make_weights(chain: Chain, weight_format: str) -> list[Any]:
    """Random weights that keep the norm of activations; no two tensors share memory."""
    rng, weights = np.random.default_rng(0), []
    for out, columns in chain.shapes:
        w = rng.standard_normal((out, columns), np.float32) / np.float32(columns**0.5)
        if weight_format == "int8":
            weights.append(jax.device_put(quantise(w)))
        else:
            dtype = {"f32": jnp.float32, "bf16": jnp.bfloat16}[weight_format]
            weights.append(jnp.asarray(w, dtype))
    return weights


def compile_loop(form: Form, rows: int, dtype: Any, weights: list[Any]):
    """`(x_AI, weights, trips) -> x_AI` as one while loop over the whole chain. The activations change from trip to trip."""

    def loop(x_AI, weights, trips):
        def one_trip(carry):
            trip, x_AI = carry
            for w in weights:
                x_AI = jnp.tanh(form(x_AI, w)).astype(dtype)
            return trip + 1, x_AI

        return jax.lax.while_loop(lambda carry: carry[0] < trips, one_trip, (0, x_AI))[1]

    x_AI = jax.ShapeDtypeStruct((rows, weights[0].shape[1]), dtype)
    return jax.jit(loop).lower(x_AI, weights, 1).compile()


def time_forms(
    chain: Chain, rows: tuple[int, ...], repeats: int, tick: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Compiles all forms, then runs them in turn, again and again.

    Args:
        chain: the products.
        rows: numbers of rows of the activations.
        repeats: runs of each form; the median counts.
        tick: called with the name of the work, once per compiled program and once per run.

    Returns:
        One row per form and number of rows: `format, form, rows, milliseconds` (of one trip through the chain), `gb_per_s`
        (weights), `gf_per_s`, `temporary_mb`, `picked` (whether `linear` uses it here).
    """
    platform = platform_of(None)
    weights = {name: make_weights(chain, name) for name in WEIGHT_FORMATS}
    programs = []
    for candidate in FORMS:
        dtype = compute_dtype(candidate.weight_format, platform)
        for count in rows:
            x_AI = jnp.ones((count, chain.dims[0]), dtype) * 0.5
            own = weights[candidate.weight_format]
            run = compile_loop(candidate.form, count, dtype, own)
            jax.block_until_ready(run(x_AI, own, 1))
            programs.append((candidate, count, run, x_AI, []))
            tick(f"compiling {candidate.weight_format} {candidate.name}")
    for _ in range(repeats):
        for candidate, _, run, x_AI, seconds in programs:
            started = time.perf_counter()
            jax.block_until_ready(run(x_AI, weights[candidate.weight_format], _TRIPS))
            seconds.append((time.perf_counter() - started) / _TRIPS)
            tick(f"timing {candidate.weight_format} {candidate.name}")
    flops = 2 * sum(out * columns for out, columns in chain.shapes)
    found = []
    for candidate, count, run, _, seconds in programs:
        median = statistics.median(seconds)
        found.append(
            {
                "format": candidate.weight_format,
                "form": candidate.name,
                "rows": count,
                "milliseconds": median * 1e3,
                "gb_per_s": weight_bytes(weights[candidate.weight_format]) / median / 1e9,
                "gf_per_s": flops * count / median / 1e9,
                "temporary_mb": run.memory_analysis().temp_size_in_bytes / 1e6,
                "picked": form_of(forms_of(platform), candidate.weight_format, count)
                is candidate.form,
            }
        )
    return found


def read_bandwidth(num_bytes: int = 1 << 29) -> float:
    """GB/s at which memory can be read: the better median of row sums by XLA and, on a CPU, by NumPy in threads."""
    rows, columns = 1024, num_bytes // 4096
    array = np.ones((rows, columns), np.float32)
    on_device, sums = jnp.asarray(array), jax.jit(lambda a: a.sum(axis=1))
    best = _median_seconds(lambda: jax.block_until_ready(sums(on_device)))
    if platform_of(None) == "cpu":
        threads = usable_cores()
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            pieces = np.array_split(array, threads)
            best = min(best, _median_seconds(lambda: list(pool.map(np.max, pieces))))
    return array.nbytes / best / 1e9


def matmul_peak(dtype: Any = jnp.float32) -> float:
    """GF/s of one large square product."""
    size = 2048 if platform_of(None) == "cpu" else 8192
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a, b: a @ b)
    return 2 * size**3 / _median_seconds(lambda: jax.block_until_ready(product(a, a))) / 1e9


def _median_seconds(run: Callable[[], Any], repeats: int = 5) -> float:
    run()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def bench_kernels(target: str | None, out: Path) -> None:
    """Measures the machine and all forms, shows the table, and writes kernels.json, kernels.md and kernels.png.

    Args:
        target: a model whose shapes are used; None takes those of a model of 1.5 billion parameters.
        out: the directory.

    Raises:
        UserError: if the target cannot be read.
    """
    chain = chain_of(None if target is None else read_description(target)[0])
    say_devices()
    with counting_bar(*eta()) as progress:
        runs = len(FORMS) * len(ROWS) * (1 + _REPEATS)
        task = progress.add_task("measuring the machine", total=runs)
        before = {"gb_per_s": read_bandwidth(), "gf_per_s": matmul_peak()}
        rows = time_forms(
            chain,
            ROWS,
            _REPEATS,
            lambda name: progress.update(task, advance=1, description=name),
        )
        after = {"gb_per_s": read_bandwidth(), "gf_per_s": matmul_peak()}
    report = {
        "environment": environment("float32"),
        "target": target,
        "chain": {"dims": chain.dims, "num_layers": chain.num_layers},
        "repeats": _REPEATS,
        # Measured before and after; on a shared machine the better value is closer to the machine's own speed.
        "machine": {name: max(before[name], after[name]) for name in before},
        "rows": rows,
    }
    write_kernels(out, json.loads(json.dumps(report)))
    show_kernels(screen(), report)
