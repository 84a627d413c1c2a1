"""Tokens per second of eight prompts together against one at a time, plain and S2D, in alternation.

Usage: batch_speed.py TARGET DRAFT QUESTIONS.jsonl [NEW_TOKENS] [ROUNDS]   (default 64 and 3; greedy, no end of text)
"""

import statistics
import sys
from pathlib import Path

from s2d_jax import DecodeConfig, SamplingParams, SpeculativeDecoder, load_draft, load_model
from s2d_jax.cli.prompts import read_questions

BATCH = 8
target, draft = load_model(sys.argv[1]), load_draft(sys.argv[2])
new_tokens = int(sys.argv[4]) if len(sys.argv) > 4 else 64
rounds = int(sys.argv[5]) if len(sys.argv) > 5 else 3
questions = read_questions(Path(sys.argv[3]))[:BATCH]
prompts = [target.tokenizer.encode_chat(question.messages([])) for question in questions]
sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
decoders = {
    "plain": SpeculativeDecoder(target),
    "S2D": SpeculativeDecoder(target, draft, DecodeConfig(num_draft_tokens=3)),
}


def tokens_per_second(decoder, batches):
    """Of the decoding loop, and with prefill."""
    all_stats = [decoder.generate(batch, sampling, time_phases=True).stats for batch in batches]
    emitted = sum(stats.emitted_tokens for stats in all_stats)
    in_loop = emitted - len(prompts)
    seconds = {
        name: sum(stats.seconds[name] for stats in all_stats) for name in ("decode", "total")
    }
    return in_loop / seconds["decode"], emitted / seconds["total"]


ways = {"1": [[prompt] for prompt in prompts], str(BATCH): [prompts]}
found = {(name, way): [] for name in decoders for way in ways}
for number in range(rounds + 1):
    for name, way in found:
        speeds = tokens_per_second(decoders[name], ways[way])
        if number:  # the first round compiles
            found[name, way].append(speeds)
for name in decoders:
    one, eight = (
        [statistics.median(column) for column in zip(*found[name, way], strict=True)]
        for way in ways
    )
    print(
        f"{name}: batch 1 {one[0]:.1f} tokens/s, batch {BATCH} {eight[0]:.1f}, {eight[0] / one[0]:.2f} times; "
        f"with prefill {one[1]:.1f}, {eight[1]:.1f}, {eight[1] / one[1]:.2f} times"
    )
