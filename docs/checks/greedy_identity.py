"""Greedy output against the width-matched reference, token for token; where they differ, the reference's top-2 margin.

Usage: greedy_identity.py --target GGUF --draft DIR --questions FILE.jsonl --batch 4 --out FILE.json
  (--methods as in infer.bench, such as ar,s2d,s2d+tree,sd@6+tree:16; trees are shaped by --tree-depth and so on)

Every method is compared with plain decoding whose target pass is as wide as its own, and `ar`, the fastest plain decoding, with
all of these references. A top-2 margin is how far the best logit lies above the second, in one pass without a cache. The exit
status is 1 if a method leaves its own reference where the margin is 1e-3 or more.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.progress import track

from infer.bench.methods import build_methods, check_trees, parse_methods
from s2d_jax import DecodeConfig, Model, SamplingParams, SpeculativeDecoder, use_compile_cache
from s2d_jax.cli.command import run_command_line
from s2d_jax.cli.loading import load_listed_draft, load_target
from s2d_jax.cli.options import DraftingOptions, LoadingOptions
from s2d_jax.cli.outputs import check_writable
from s2d_jax.cli.screen import screen
from s2d_jax.files import write_text
from s2d_jax.model.transformer import Transformer

NEAR_TIE = 1e-3


@dataclasses.dataclass(frozen=True)
class Args:
    """Compare greedy output, method by method, with plain decoding of the same width."""

    target: str
    questions: Path
    out: Path
    draft: str | None = None
    independent_draft: str | None = None
    draft_vocabulary: str | None = None
    batch: int = 1
    prompts: int = 60
    longest_prompt: int = 256
    new_tokens: int = 128
    methods: str = "ar,s2d,sd@6,sd@12"
    drafting: tyro.conf.OmitArgPrefixes[DraftingOptions] = DraftingOptions(num_draft_tokens=4)


def read_prompts(args: Args, tokenizer) -> list[list[int]]:
    """The first turns of `prompts` questions, taken evenly from those that are short enough, by length."""
    lines = args.questions.read_text(encoding="utf-8").splitlines()
    turns = [json.loads(line)["turns"][0] for line in lines]
    ids = [tokenizer.encode_chat([{"role": "user", "content": turn}]) for turn in turns]
    short = sorted((row for row in ids if len(row) <= args.longest_prompt), key=len)
    picked = np.linspace(0, len(short) - 1, args.prompts).astype(int)
    return [short[i] for i in picked]


def top_two_margin(target: Model, tokens: list[int]) -> float:
    """How far the best next-token logit lies above the second, after `tokens`."""
    padded = np.zeros((1, -(-len(tokens) // 128) * 128), np.int32)
    padded[0, : len(tokens)] = tokens
    logits_1TV = _all_logits(target.config)(target.params, jnp.asarray(padded))
    second, first = np.partition(np.asarray(logits_1TV[0, len(tokens) - 1]), -2)[-2:]
    return float(first - second)


@functools.cache
def _all_logits(config):
    return jax.jit(lambda params, tokens: Transformer(config).apply({"params": params}, tokens))


def divergences_of(target: Model, prompts, found, reference) -> list[dict]:
    """Prompts whose tokens are not the reference's: where they part, and the margin there."""
    divergences = []
    for number, (prompt, own, expected) in enumerate(zip(prompts, found, reference, strict=True)):
        if own != expected:
            pairs = enumerate(zip(own, expected, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(own), len(expected)))
            margin = top_two_margin(target, prompt + expected[:at])
            divergences.append({"prompt": number, "position": at, "margin": margin})
    return divergences


class Check:
    """Tokens and MAT of decoders on all prompts, in batches."""

    def __init__(self, args: Args, target: Model):
        self.args, self.target = args, target
        self.prompts = read_prompts(args, target.tokenizer)
        self.tokens: dict[str, list[list[int]]] = {}
        self.mat: dict[str, float] = {}
        self.divergences: dict[str, list[dict]] = {}

    def decode(self, name: str, decoder: SpeculativeDecoder) -> None:
        """Answers all prompts, unless `name` did before."""
        if name in self.tokens:
            return
        size, sampling = self.args.batch, SamplingParams(max_new_tokens=self.args.new_tokens)
        batches = [self.prompts[i : i + size] for i in range(0, len(self.prompts), size)]
        steps = track(batches, name, console=screen(stderr=True))
        results = [decoder.generate(rows, sampling) for rows in steps]
        self.tokens[name] = [ids for result in results for ids in result.token_ids]
        stats = [result.stats for result in results]
        forwards = sum(s.target_forwards for s in stats)
        self.mat[name] = sum(s.emitted_tokens - s.rows for s in stats) / forwards

    def compare(self, name: str, width: int) -> None:
        """Prints how far `name` agrees with the reference of `width`."""
        reference = f"reference of width {width}"
        config = DecodeConfig(verify_width=width)
        self.decode(reference, SpeculativeDecoder(self.target, None, config))
        tokens = self.tokens[name], self.tokens[reference]
        found = divergences_of(self.target, self.prompts, *tokens)
        self.divergences[f"{name}, {reference}"] = found
        print(
            f"batch {self.args.batch} {name:12s} MAT {self.mat[name]:.2f}  equal to the {reference} "
            f"{len(self.prompts) - len(found)}/{len(self.prompts)}",
            flush=True,
        )
        for one in found:
            where = f"prompt {one['prompt']} position {one['position']}"
            print(f"  {where}: top-2 margin {one['margin']:.2e}", flush=True)


def main(args: Args) -> None:
    check_writable(args.out)
    names = parse_methods(args.methods)
    check_trees(names, args.drafting)
    use_compile_cache()
    target = load_target(args.target, LoadingOptions())
    draft, independent = (
        load_listed_draft(path, args.draft_vocabulary if path else None, "f32")
        for path in (args.draft, args.independent_draft)
    )
    asked = [name.strip() for name in args.methods.split(",")]
    methods = build_methods(names, target, draft, independent, args.drafting)
    methods = [method for method in methods if method.name in asked]
    check, widths = Check(args, target), {}
    for method in methods:
        check.decode(method.name, method.decoder)
        widths[method.name] = method.decoder.verify_width
    for name, width in widths.items():
        for other in dict.fromkeys(widths.values()) if name == "ar" else (width,):
            check.compare(name, other)
    report = {
        "prompts": check.prompts,
        "tokens": check.tokens,
        "mat": check.mat,
        "divergences": check.divergences,
    }
    write_text(args.out, json.dumps(report))
    margins = [
        one["margin"]
        for pair, found in check.divergences.items()
        if not pair.startswith("ar,")
        for one in found
    ]
    if any(margin >= NEAR_TIE for margin in margins):
        sys.exit(f"a method leaves its reference where the margin is {max(margins):.2e}")
    print(f"{len(margins)} divergences, all of them near ties" if margins else "no divergences")


if __name__ == "__main__":
    run_command_line(Args, main)
