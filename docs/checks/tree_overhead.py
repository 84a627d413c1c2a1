"""What of a round with a tree is not a pass of a model: growing, masks, scoring, acceptance and compaction together.

Usage: tree_overhead.py --target MODEL --draft DIR [--tree-nodes 60 ...] [--exit K] [--repeats 9]
  (--independent-draft MODEL for a draft that is no sorted one)

A round is timed as it is decoded: one compiled loop of `rounds` rounds after a real prompt, prefill left out, thresholds
set so that every level of every tree leaves at one exit; then it is known which passes a round makes. What is not a pass is
found in two ways.

`own`: the same loop, compiled with models that do nothing. Their layers only look at positions and mask, so that these are
still computed; their logits are rows of a table, chosen by the token, the same for target and draft, so that every round
accepts a path to the last level and moves its keys and values, which have their real sizes. What is left is growing
(softmax, top-k, ranking, gathers), confidence, positions and masks, acceptance, moving keys and values, stop conditions and
the loops themselves; copying rows of the table is in it too, so it is rather too much. `propose`, `verify`, `accept` split
it, as programs of their own that are waited for one by one.

`left`: the round less its passes, which are timed in loops of their own, on caches of the same size that hold the same
text, with positions and masks given:

  target  one pass over the tree's nodes, and its logits;
  root    per segment up to the exit, the pass that takes in what waits of the text, and the logits of one position;
  levels  per segment up to the exit, and per level but the first, the pass over the level's nodes, and their logits.

So attention under a mask, norms, K/V writes and heads count as the models'. `left` is a small difference of large numbers,
and moves with the machine; it is there to show that `own` has missed nothing, such as a copied cache. In every repeat
everything is timed one after the other; shares are medians over the repeats.
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

from s2d_jax import SamplingParams, SpeculativeDecoder, use_compile_cache
from s2d_jax.cli.command import run_command_line
from s2d_jax.cli.loading import load_listed_draft, load_target
from s2d_jax.cli.options import DraftingOptions, LoadingOptions
from s2d_jax.cli.screen import screen
from s2d_jax.cli.short_text import short_name
from s2d_jax.decode import programs as compilation
from s2d_jax.decode.timed_rounds import timed_rounds
from s2d_jax.errors import UserError
from s2d_jax.files import write_text
from s2d_jax.model.place import Place
from s2d_jax.model.transformer import Transformer

PASSES, TABLE_ROWS = 4, 64
SURE = 16.0  # nats
Program = Callable[[], float]


@dataclasses.dataclass(frozen=True)
class Args:
    """Time rounds and their passes."""

    target: str
    draft: str | None = None
    independent_draft: str | None = None
    exit: int | None = None
    """Only this exit; else the shallowest and the deepest in use."""
    temperature: float = 0.0
    prompt: str = "Describe a walk by the sea."
    rounds: int = 12
    repeats: int = 9
    out: Path | None = None
    """Write the figures here as JSON."""
    drafting: tyro.conf.OmitArgPrefixes[DraftingOptions] = DraftingOptions(tree=True)
    loading: tyro.conf.OmitArgPrefixes[LoadingOptions] = LoadingOptions()


class Silent:
    """Stands for a `Transformer`, and computes nothing: its logits are rows of a table, chosen by the token."""

    __class__ = property(lambda self: Transformer)  # for checks of types

    def __init__(self, model):
        self.config, self.dtype = model.config, model.dtype

    def apply(self, variables, *args, method: str):
        return getattr(self, method)(variables["params"], *args)

    def embed(self, params, tokens_BT):
        h_BTD = jnp.zeros((*tokens_BT.shape, self.config.embed_dim), self.dtype)
        return h_BTD.at[:, :, 0].set((tokens_BT % len(params["table"])).astype(self.dtype))

    def run_blocks(self, params, h_BTD, cache, start, stop, place=None):
        if place is None:
            return h_BTD, cache
        seen_BT = place.positions_BT + jnp.sum(place.mask_BTS, axis=-1, dtype=jnp.int32)
        return h_BTD.at[:, :, 1].set(seen_BT.astype(self.dtype)), cache

    def logits(self, params, h, exit_layer=None):
        nothing = 1e-30 * h[..., 1:2].astype(jnp.float32)  # but XLA cannot know
        return params["table"][h[..., 0].astype(jnp.int32)] + nothing


def without_models(static):
    """The decoder with silent models, and their parameters."""
    segments = static.drafter.segments
    silent = dataclasses.replace(segments, model=Silent(segments.model))
    drafter = dataclasses.replace(static.drafter, segments=silent)
    target = dataclasses.replace(static.target, model=Silent(static.target.model))
    verifier = dataclasses.replace(static.verifier, drafter=drafter)
    return dataclasses.replace(static, target=target, drafter=drafter, verifier=verifier)


def tables(vocab_size: int, draft_size: int, ids_U) -> dict:
    """Logits that agree: of the target, and of the draft over its own entries.

    Each row has one token that is far above the others: a small tree too has the path of these tokens down to the last level.
    """
    target = 16 * jax.random.normal(jax.random.key(0), (TABLE_ROWS, vocab_size))
    target = target.at[jnp.arange(TABLE_ROWS), jnp.argmax(target, axis=1)].add(SURE)
    missing = max(draft_size - vocab_size, 0)
    padded = jnp.pad(target, ((0, 0), (0, missing)), constant_values=-jnp.inf)
    draft = padded[:, :draft_size] if ids_U is None else target[:, ids_U]
    return {"target": {"table": target}, "draft": {"table": draft}}


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
        self.silent = without_models(self.static)
        self.tables = self._tables()

    def _tables(self) -> dict:
        vocab_size, model = self.segments.vocab_size, self.segments.model
        own = model.trimmed_head_size or model.config.vocab_size
        return tables(vocab_size, own, self.request.vocabulary_U)

    def fresh_state(self):
        """After prefill."""
        return jax.block_until_ready(self.programs.prefill(*self.args))

    def seconds_per_round(self, *, silent: bool = False) -> float:
        """In the one loop that decoding runs."""
        static, params = (self.silent, self.tables) if silent else (self.static, self.params)
        inputs = params, self.request, self.fresh_state()
        program, _ = compilation.run_program(static, inputs)
        started = time.perf_counter()
        state = jax.block_until_ready(program(*inputs))
        spent = time.perf_counter() - started
        self._check(state)
        if silent and static.verifier.greedy:
            deepest = int(state.accepted_BG[0, -1])
            assert deepest == self.rounds, f"{deepest} rounds accepted a whole path"
        return spent / self.rounds

    def seconds_by_part(self) -> dict[str, float]:
        """Without models, with the parts as programs of their own."""
        inputs = self.tables, self.request, self.fresh_state()
        _, seconds, _ = timed_rounds(self.silent, *inputs, self.rounds)
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
        seen_S = jnp.arange(capacity) <= cache.length_B[0]
        return Place(position_BT, jnp.broadcast_to(seen_S, (1, width, capacity)))

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
            h_BTD, logits_BTU = carry
            h_BTD = h_BTD + (1e-6 * logits_BTU[:, :, :1]).astype(h_BTD.dtype)
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
    rounds.seconds_per_round(), rounds.seconds_per_round(silent=True), rounds.seconds_by_part()
    columns: dict[str, list[float]] = {}
    for _ in track(range(repeats), name, console=screen(stderr=True)):
        whole, own = rounds.seconds_per_round(), rounds.seconds_per_round(silent=True)
        of_models = {
            what: sum(count * program() for program, count in listed)
            for what, listed in passes.items()
        }
        found = {"round": whole, **of_models, "own": own, **rounds.seconds_by_part()}
        found = {what: 1e3 * spent for what, spent in found.items()}
        found |= {"own_share": own / whole, "left_share": 1 - sum(of_models.values()) / whole}
        for what, value in found.items():
            columns.setdefault(what, []).append(value)
    spread = {
        f"{what}_spread": (min(columns[what]), max(columns[what]))
        for what in ("own_share", "left_share")
    }
    medians = {what: statistics.median(column) for what, column in columns.items()}
    return {"name": name, "nodes": rounds.growth.nodes, **medians, **spread}


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
    if args.rounds < 1 or args.repeats < 1:
        raise UserError(f"rounds={args.rounds} and repeats={args.repeats} must be at least 1")
    if args.drafting.tree_paths is not None:
        raise UserError("--tree-paths: what is timed here is growing; leave it out")
    path = args.draft or args.independent_draft
    if path is None:
        raise UserError("there is nothing to draft with; give --draft or --independent-draft")
    use_compile_cache(args.loading.compile_cache)
    target = load_target(args.target, args.loading)
    draft = load_listed_draft(path, args.loading.draft_vocabulary, args.loading.draft_format)
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
    title = f"{short_name(args.target)}: a round of {rows[0]['nodes']} nodes, ms; shares of it (least, most)"
    table = Table(title=title, title_justify="left", padding=(0, 0, 0, 1))
    columns = {"round": "round", "target": "target", "root": "root", "levels": "levels"}
    columns |= {"own": "own", "draft": "propose", "verify": "verify", "rest": "accept"}
    for name in ("leave at", *columns.values(), "own share", "left share"):
        table.add_column(name, justify="right")
    for row in rows:
        milliseconds = [f"{row[what]:.2f}" for what in columns]
        shares = [
            f"{row[what]:.1%}\n({', '.join(f'{each:.1%}' for each in row[f'{what}_spread'])})"
            for what in ("own_share", "left_share")
        ]
        table.add_row(row["name"], *milliseconds, *shares)
    screen().print(table)


if __name__ == "__main__":
    run_command_line(Args, main)
