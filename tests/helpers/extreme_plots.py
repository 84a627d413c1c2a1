"""Data that is hard to draw: few and many methods, long names, wide ranges, gaps, long runs, deep and wide trees."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from infer.generate.rounds import Node, Round

EXITS = (4, 8, 12, 18, 24)
TARGETS = (
    "/models/Meta-Llama-3.1-70B-Instruct-abliterated-lorablated-v2.Q4_K_M.gguf",
    "/models/DeepSeek-R1-Distill-Qwen-32B-longer-context-131072-bf16",
    "/models/Qwen2.5-Coder-1.5B-Instruct.Q4_K_M.gguf",
    "/other/Qwen2.5-Coder-1.5B-Instruct.Q4_K_M.gguf",
)
_LABELS = (
    *("Autoregressive", "SoFT + S2D", "auto", "SoFT L4 + SD", "SoFT L12 + SD, 15 tokens"),
    *("SoFT + S2D, 2 tokens", "SoFT + S2D + tree", "SoFT + S2D + tree, 60 nodes"),
    *("whole draft + SD", "whole draft + SD + tree, 60 nodes", "SoFT L24 + SD"),
    "Qwen2.5-Coder-0.5B-Instruct-Q8_0 + SD + tree, 60 nodes",
)
_TOKENS = (
    *(" the", "\n", "\n" * 30, "a" * 30, "W" * 30, "$x_1$", "猫が好きです" * 5, "😀" * 4, "👩‍👩‍👧"),
    *('"', "'", "\\", "\t\x00", " internationalization", "", "é", "مرحبا"),
)


def bench_rows(
    methods: int, targets: int, exits: int, widest: float = 12.0
) -> list[dict[str, Any]]:
    """Rows of a report: speedups from 0.3 to `widest`, the baseline first."""
    rng, rows = np.random.default_rng(0), []
    for target in TARGETS[:targets]:
        for number, label in enumerate(_LABELS[:methods]):
            speedup = 1.0 if number == 0 else float(np.geomspace(0.3, widest, 11)[number - 1])
            histogram = dict(
                zip(EXITS[:exits], map(int, rng.integers(0, 1000, exits)), strict=True)
            )
            if label.startswith("SoFT L"):
                histogram = {EXITS[exits - 1]: 70}
            depth = (5, 2, 15, 1)[number % 4]
            accepted = np.cumprod(rng.uniform(0.5, 1, depth)).tolist()
            rows.append(
                {
                    "label": label,
                    "target": target,
                    "speedup": speedup,
                    "mean_acceptance_length": 1.0 + 0.7 * number,
                    "exit_histogram": histogram if number else {},
                    "accepted_per_depth": accepted if number else [],
                }
            )
    return rows


def metrics_rows(
    evaluations: int, steps: int, exits: int, *, gaps: bool = False
) -> list[dict[str, Any]]:
    """The metrics of a run; with `gaps`, nothing could be said of a third of the evaluations."""
    rng, layers = np.random.default_rng(0), [str(layer) for layer in EXITS[:exits]]
    noise = rng.normal(0, 0.25, (max(steps, 1), exits))

    def loss(step: int) -> dict[str, float]:
        falling = 1.5 + 9 * math.exp(-step / max(steps / 20, 1))
        return {layer: falling + 0.3 * (exits - i) for i, layer in enumerate(layers)}

    def held_out(number: int, step: int) -> dict[str, Any]:
        known = not (gaps and number % 3 == 1)
        share = 1 - math.exp(-4 * number / max(evaluations, 2))
        agreement = {layer: 0.2 + share * (0.3 + 0.05 * i) for i, layer in enumerate(layers)}
        return {
            "step": step,
            "held_out": True,
            "loss_per_exit": loss(step),
            "agreement_per_exit": agreement if known else dict.fromkeys(layers),
            "mat_per_exit": {k: 1 + 2 * v if known else None for k, v in agreement.items()},
            "s2d_mat": 2.0 * share + 1 if known else None,
        }

    every, rows = max(steps // evaluations, 1), []
    for step in range(max(steps, 1)):
        if steps:
            values = {k: v + n for (k, v), n in zip(loss(step).items(), noise[step], strict=True)}
            rows.append({"step": step, "loss_per_exit": values})
        if step % every == 0:
            rows.append(held_out(step // every, step))
    return rows


def chain_round(length: int) -> Round:
    """A chain of which half is accepted."""
    return _round([(max(depth - 1, 0), depth) for depth in range(length + 1)], length // 2)


def tree_round(nodes: int, depth: int) -> Round:
    """A tree with a spine of `depth` nodes, of which half is accepted, and branches everywhere."""
    rng, shape = np.random.default_rng(1), [(max(d - 1, 0), d) for d in range(depth + 1)]
    while len(shape) < nodes:
        parent = int(rng.integers(len(shape)))
        if shape[parent][1] < depth:
            shape.append((parent, shape[parent][1] + 1))
    return _round(shape, depth // 2)


def _round(shape: list[tuple[int, int]], accepted: int) -> Round:
    made = [
        Node(
            parent=parent,
            depth=depth,
            token_id=number,
            text=_TOKENS[number % len(_TOKENS)],
            probability=0.9**number if number else None,
            exit=EXITS[number % len(EXITS)] if number else None,
            accepted=number <= accepted,
        )
        for number, (parent, depth) in enumerate(shape)
    ]
    return Round(1234, tuple(made), 7, "W" * 30)


def kernel_report(counts: tuple[int, ...], formats: int) -> dict[str, Any]:
    """Forms of products whose times range over four decades."""
    forms = {
        "f32": ("x first", "weight first", "weight first, barrier"),
        "bf16": (
            "x first",
            "x first, tied",
            "weight first, barrier",
            "weight first, tied",
            "blocks to f32",
        ),
        "int8": ("to f32, x first", "to f32, x first, tied", "blocks to f32", "two int8 digits"),
    }
    rows = [
        {
            "format": weight_format,
            "form": form,
            "rows": count,
            "milliseconds": 0.02 * (1 + count**1.3) * (1.0 + 0.4 * number),
            "picked": number == 1,
        }
        for weight_format in list(forms)[:formats]
        for number, form in enumerate(forms[weight_format])
        for count in counts
    ]
    return {"rows": rows}
