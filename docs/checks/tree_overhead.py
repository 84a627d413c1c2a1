"""What of a round with a tree is not a pass of a model: growing, masks, scoring, acceptance and compaction together.

Usage: tree_overhead.py --target MODEL --draft DIR [--tree-nodes 60 ...] [--exit K] [--repeats 9]
  (--independent-draft MODEL for a draft that is no sorted one)

A round is timed as it is decoded: one compiled loop of `rounds` rounds after a real prompt, prefill left out, thresholds
set so that every level of every tree leaves at one exit; then it is known which passes a round makes. These are timed in
loops of their own, on caches of the same size that hold the same text, with positions and masks given:

  target  one pass over the tree's nodes, and its logits;
  root    per segment up to the exit, the pass that takes in what waits of the text, and the logits of one position;
  levels  per segment up to the exit, and per level but the first, the pass over the level's nodes, and their logits.

So attention under a mask, norms, K/V writes and heads count as the models'. All else of the round is overhead: softmax,
top-k and ranking of candidates, gathers, building positions and masks, confidence, acceptance, moving keys and values, stop
conditions and the loops themselves. In every repeat the round and all passes are timed one after the other; shares are
medians over the repeats.

The last three columns split the overhead, with propose, verify and accept as programs of their own that are waited for one
by one; `accept` then also holds the time in which the host asks whether to go on.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro
from rich.progress import track
from rich.table import Table

from infer.cli import run_command_line, screen
from infer.formats import short_name
from infer.loading import load_listed_draft, load_target
from infer.options import ComputeOptions, DraftingOptions
from s2d_jax import SamplingParams, SpeculativeDecoder, compilation, use_compile_cache
from s2d_jax.config import UserError
from s2d_jax.files import write_text
from s2d_jax.phases import timed_rounds

PASSES = 4
Program = Callable[[], float]


@dataclasses.dataclass(frozen=True)
class Args:
    """Time rounds and their passes."""

    target: str
    draft: str | None = None
    independent_draft: str | None = None
    draft_vocabulary: str | None = None
    exit: int | None = None
    """Only this exit; else the shallowest and the deepest in use."""
    temperature: float = 0.0
    prompt: str = "Describe a walk by the sea."
    rounds: int = 12
    repeats: int = 9
    out: Path | None = None
    """Write the figures here as JSON."""
    drafting: tyro.conf.OmitArgPrefixes[DraftingOptions] = DraftingOptions(tree=True)
    compute: tyro.conf.OmitArgPrefixes[ComputeOptions] = ComputeOptions()


class Rounds:
    """Rounds of one decoder in mid-text, and the passes that they make.

    Args:
        decoder: with a tree.
        prompt: token ids.
        temperature: of the answer.
        rounds: per measurement.
        exit_index: where all levels leave.
    """

    def __init__(self, decoder: SpeculativeDecoder, prompt, temperature, rounds: int, exit_index):
        depth = decoder.config.draft_width
        params = SamplingParams(
            temperature=temperature, max_new_tokens=(rounds + 1) * (depth + 1), ignore_eos=True
        )
        self.static, width, args = decoder.prepare([prompt], [params])
        self.params, request, *_ = args
        self.request = request.replace(max_rounds=jnp.int32(rounds))
        self.args = (self.params, self.request, *args[2:])
        self.programs, _ = compilation.programs(self.static, width, self.args)
        self.rounds, self.exit_index = rounds, exit_index
        self.growth, self.segments = self.static.drafter.growth, self.static.drafter.segments
        self.state = self.fresh_state()

    def fresh_state(self):
        """After prefill."""
        return jax.block_until_ready(self.programs.prefill(*self.args))

    def seconds_per_round(self) -> float:
        """In the one loop that decoding runs."""
        state = self.fresh_state()
        started = time.perf_counter()
        state = jax.block_until_ready(self.programs.run(self.params, self.request, state))
        spent = time.perf_counter() - started
        self._check(state)
        return spent / self.rounds

    def seconds_by_part(self) -> dict[str, float]:
        """The same with the parts as programs of their own."""
        state = self.fresh_state()
        _, seconds, _ = timed_rounds(self.static, self.params, self.request, state, self.rounds)
        return {part: spent / self.rounds for part, spent in seconds.items()}

    def _check(self, state) -> None:
        """The passes that were counted are those that were made."""
        assert int(state.rounds_B[0]) == self.rounds
        made = self.static.drafter.stats(state.draft_state)["segment_passes"].tolist()
        reached = range(len(made))
        expected = [self.rounds * self.growth.depth * (s <= self.exit_index) for s in reached]
        assert made == expected, f"segments ran {made} times, not {expected}"

    def passes(self) -> dict[str, list[tuple[Program, int]]]:
        """Programs and how often a round runs them, by what they are a part of."""
        drafter, levels = self.static.drafter, self.growth.depth - 1
        waiting, width = 2, self.growth.width
        found: dict[str, list[tuple[Program, int]]] = {"target": [(self._target(), 1)]}
        found["root"], found["levels"] = [], []
        for s in range(self.exit_index + 1):
            root_width = waiting if s == 0 else drafter.catch_up_width
            level_width = width if s == 0 else max(width, drafter.catch_up_width)
            found["root"] += [(self._segment(s, root_width, False), 1), (self._head(s, 1), 1)]
            if levels:
                found["levels"].append((self._segment(s, level_width, True), levels))
                found["levels"].append((self._head(s, width), levels))
        return found

    def _place(self, cache, width: int):
        """Positions and mask of some tree: what they are changes nothing about the time."""
        capacity = cache.keys[0].shape[2]
        position_BT = jnp.broadcast_to(cache.length_B[:, None], (1, width))
        seen_C = jnp.arange(capacity) <= cache.length_B[0]
        return position_BT, jnp.broadcast_to(seen_C, (1, width, capacity))

    def _target(self) -> Program:
        target, M = self.static.target, self.growth.nodes
        cache, vocab_size = self.state.target_cache, target.model.config.vocab_size

        def one(params, place, carry):
            cache, logits_BMV = carry
            # Tokens that depend on the pass before: nothing can be left out, or computed once.
            tokens_BM = jnp.argmax(logits_BMV[:, :, :8], axis=-1).astype(jnp.int32)
            h_BMD, cache = target.forward(params, tokens_BM, cache, place)
            return cache, target.logits(params, h_BMD)

        start = cache, jnp.zeros((1, M, vocab_size), jnp.float32)
        return looped(one, self.params["target"], self._place(cache, M), start)

    def _segment(self, s: int, width: int, in_tree: bool) -> Program:
        model, layers = self.segments.model, (0, *self.segments.exit_layers)
        cache = self.state.draft_state.segments[s]

        def one(params, place, carry):
            cache, h_BTD = carry
            apply = lambda method, *args: model.apply({"params": params}, *args, method=method)  # noqa: E731
            if s == 0:
                tokens_BT = (h_BTD[:, :, 0] > 0).astype(jnp.int32)
                entry_BTD = apply("embed", tokens_BT)
            else:
                entry_BTD = h_BTD * jnp.asarray(1e-6, h_BTD.dtype)
            h_BTD, cache = apply("run_blocks", entry_BTD, cache, *layers[s : s + 2], place)
            return cache, h_BTD

        h_BTD = jnp.ones((1, width, model.config.embed_dim), model.dtype)
        place = self._place(cache, width) if in_tree else None
        return looped(one, self.params["draft"], place, (cache, h_BTD))

    def _head(self, s: int, width: int) -> Program:
        model, exit_layer = self.segments.model, self.segments.exit_layers[s]

        def logits(params, h_BTD):
            return model.apply({"params": params}, h_BTD, exit_layer, method="logits")

        def one(params, _, carry):
            h_BTD, logits_BTK = carry
            h_BTD = h_BTD + (1e-6 * logits_BTK[:, :, :1]).astype(h_BTD.dtype)
            return h_BTD, logits(params, h_BTD)

        h_BTD = jnp.ones((1, width, model.config.embed_dim), model.dtype)
        found = jax.eval_shape(logits, self.params["draft"], h_BTD)
        start = h_BTD, jnp.zeros(found.shape, found.dtype)
        return looped(one, self.params["draft"], None, start)


def looped(one: Callable, params, place, start) -> Program:
    """Seconds of `one(params, place, carry)` in a compiled loop, warm."""

    def passes(params, place, carry):
        return jax.lax.fori_loop(0, PASSES, lambda _, carry: one(params, place, carry), carry)

    program = jax.jit(passes, donate_argnums=2).lower(params, place, start).compile()

    def seconds() -> float:
        carry = jax.block_until_ready(jax.tree.map(jnp.copy, start))
        started = time.perf_counter()
        jax.block_until_ready(program(params, place, carry))
        return (time.perf_counter() - started) / PASSES

    seconds()
    return seconds


def measure(rounds: Rounds, repeats: int, name: str) -> dict:
    """Medians of milliseconds, and of shares that are taken repeat by repeat."""
    passes = rounds.passes()
    rounds.seconds_per_round(), rounds.seconds_by_part()  # warm-up
    columns: dict[str, list[float]] = {}

    def note(what: str, value: float) -> None:
        columns.setdefault(what, []).append(value)

    for _ in track(range(repeats), name, console=screen(stderr=True)):
        whole = rounds.seconds_per_round()
        own = {
            what: sum(count * program() for program, count in listed)
            for what, listed in passes.items()
        }
        parts = rounds.seconds_by_part()
        note("round", 1e3 * whole)
        for what, spent in own.items():
            note(what, 1e3 * spent)
        note("overhead", 1 - sum(own.values()) / whole)
        in_parts = sum(parts.values())
        note("propose", (parts["draft"] - own["root"] - own["levels"]) / in_parts)
        note("verify", (parts["verify"] - own["target"]) / in_parts)
        note("accept", parts["rest"] / in_parts)
    medians = {what: statistics.median(column) for what, column in columns.items()}
    spread = min(columns["overhead"]), max(columns["overhead"])
    return {"name": name, "nodes": rounds.growth.nodes, **medians, "overhead_spread": spread}


def decoders_of(args: Args, target, draft) -> list[tuple[str, SpeculativeDecoder, int]]:
    """A decoder for each exit at which levels shall leave, and the index of that exit."""
    asked = args.drafting.config()
    exits = asked.exits or draft.draft_config.exit_layers
    chosen = tuple(dict.fromkeys((exits[0], exits[-1]))) if args.exit is None else (args.exit,)
    if not set(chosen) <= set(exits):
        raise UserError(f"exit {args.exit} is not in use; use one of {exits}")
    made = []
    for layer in chosen:  # a threshold of 1 is never passed, one of 0 always
        index = exits.index(layer)
        thresholds = (*(1.0 for _ in exits[:index]), *(0.0 for _ in exits[index:]))
        config = args.drafting.config(exits=exits, exit_thresholds=thresholds)
        made.append((f"exit {layer}", SpeculativeDecoder(target, draft, config), index))
    return made


def main(args: Args) -> None:
    path = args.draft or args.independent_draft
    if path is None:
        raise UserError("there is nothing to draft with; give --draft or --independent-draft")
    use_compile_cache(args.compute.compile_cache)
    target = load_target(args.target, args.compute.target_format)
    draft = load_listed_draft(path, args.draft_vocabulary, args.compute.draft_format)
    prompt = target.tokenizer.encode_chat([{"role": "user", "content": args.prompt}])
    found = [
        measure(Rounds(decoder, prompt, args.temperature, args.rounds, index), args.repeats, name)
        for name, decoder, index in decoders_of(args, target, draft)
    ]
    show(args, found)
    if args.out is not None:
        write_text(
            args.out, json.dumps({"settings": dataclasses.asdict(args), "rows": found}, default=str)
        )


def show(args: Args, rows: list[dict]) -> None:
    table = Table(title=f"{short_name(args.target)}: a round of {rows[0]['nodes']} nodes, ms")
    header = ("all levels leave at", "round", "target", "root", "levels", "overhead", "least, most")
    for number, name in enumerate((*header, "propose", "verify", "accept")):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        milliseconds = [f"{row[what]:.2f}" for what in ("round", "target", "root", "levels")]
        least, most = row["overhead_spread"]
        shares = [f"{row[what]:.1%}" for what in ("propose", "verify", "accept")]
        spread = f"{least:.1%}, {most:.1%}"
        table.add_row(row["name"], *milliseconds, f"{row['overhead']:.1%}", spread, *shares)
    screen().print(table)


if __name__ == "__main__":
    run_command_line(Args, main)
