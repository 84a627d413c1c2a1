"""Greedy S2D and SD against the width-matched reference, token for token, and where the fastest plain decoding differs.

Usage: greedy_identity.py --target GGUF --draft DIR --questions FILE.jsonl --batch 4 --out FILE.json
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.progress import track

from s2d_jax import (
    DecodeConfig,
    Draft,
    Model,
    SamplingParams,
    SpeculativeDecoder,
    load_draft,
    load_model,
)
from s2d_jax.model import Transformer


@dataclasses.dataclass(frozen=True)
class Args:
    target: str
    draft: str
    questions: Path
    out: Path
    batch: int = 1
    prompts: int = 60
    longest_prompt: int = 256
    new_tokens: int = 128
    num_draft_tokens: int = 4
    methods: str = "ar,s2d,sd@6,sd@12"


def read_prompts(args: Args, tokenizer) -> list[list[int]]:
    """The first turns of `prompts` questions, taken evenly from those that are short enough, by length."""
    lines = args.questions.read_text(encoding="utf-8").splitlines()
    turns = [json.loads(line)["turns"][0] for line in lines]
    ids = [tokenizer.encode_chat([{"role": "user", "content": turn}]) for turn in turns]
    short = sorted((row for row in ids if len(row) <= args.longest_prompt), key=len)
    picked = np.linspace(0, len(short) - 1, args.prompts).astype(int)
    return [short[i] for i in picked]


def decoders(target: Model, draft: Draft, args: Args) -> dict[str, SpeculativeDecoder]:
    fixed = DecodeConfig(num_draft_tokens=args.num_draft_tokens)
    reference = DecodeConfig(verify_width=args.num_draft_tokens + 1)
    made = {"reference": SpeculativeDecoder(target, None, reference)}
    for name in args.methods.split(","):
        if name == "ar":
            made[name] = SpeculativeDecoder(target)
        elif name == "s2d":
            made[name] = SpeculativeDecoder(target, draft, fixed)
        else:
            exits = (int(name.removeprefix("sd@")),)
            config = dataclasses.replace(fixed, exits=exits)
            made[name] = SpeculativeDecoder(target, draft, config)
    return made


def top_two_margin(target: Model, tokens: list[int]) -> float:
    """How far the best next-token logit lies above the second, after `tokens`."""
    logits_V = _last_logits(target, tokens)
    second, first = np.partition(logits_V, -2)[-2:]
    return float(first - second)


def _last_logits(target: Model, tokens: list[int]) -> np.ndarray:
    padded = np.zeros((1, -(-len(tokens) // 128) * 128), np.int32)
    padded[0, : len(tokens)] = tokens
    apply = jax.jit(lambda params, x: Transformer(target.config).apply({"params": params}, x))
    return np.asarray(apply(target.params, jnp.asarray(padded))[0, len(tokens) - 1])


def main(args: Args) -> None:
    target, draft = load_model(args.target), load_draft(args.draft)
    prompts = read_prompts(args, target.tokenizer)
    sampling = SamplingParams(max_new_tokens=args.new_tokens)
    batches = [prompts[i : i + args.batch] for i in range(0, len(prompts), args.batch)]
    tokens: dict[str, list[list[int]]] = {}
    rates = {}
    for name, decoder in decoders(target, draft, args).items():
        results = [decoder.generate(rows, sampling) for rows in track(batches, name)]
        tokens[name] = [ids for result in results for ids in result.token_ids]
        stats = [result.stats for result in results]
        forwards = sum(s.target_forwards for s in stats)
        rates[name] = sum(s.emitted_tokens - s.rows for s in stats) / forwards
        same = sum(a == b for a, b in zip(tokens[name], tokens["reference"], strict=True))
        print(
            f"batch {args.batch} {name:10s} MAT {rates[name]:.2f}  equal to the reference {same}/{len(prompts)}",
            flush=True,
        )
    divergences = []
    for prompt, plain, reference in zip(
        prompts, tokens.get("ar", []), tokens["reference"], strict=False
    ):
        if plain != reference:
            at = next(i for i, (a, b) in enumerate(zip(plain, reference, strict=False)) if a != b)
            margin = top_two_margin(target, prompt + reference[:at])
            divergences.append({"prompt_tokens": len(prompt), "position": at, "margin": margin})
    if "ar" in tokens:
        print(f"width 1 leaves the reference on {len(divergences)} prompts: {divergences}")
    report = {"prompts": prompts, "tokens": tokens, "mat": rates, "ar_divergences": divergences}
    args.out.write_text(json.dumps(report))


if __name__ == "__main__":
    main(tyro.cli(Args))
