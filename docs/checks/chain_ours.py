"""Chains from a draft's first exit, f32; prints rounds/s. With alternate.py and two clones: whether chains have become slower.

Usage: chain_ours.py TARGET DRAFT NEW_TOKENS TEMPERATURE
"""

import statistics
import sys
import time

from prompts import PROMPTS

from s2d_jax import DecodeConfig, SamplingParams, SpeculativeDecoder, load_draft, load_model

path, new_tokens, temperature = sys.argv[1], int(sys.argv[3]), float(sys.argv[4])
model = load_model(path)
draft = load_draft(sys.argv[2])
# One exit: all rounds make the same passes.
config = DecodeConfig(exits=draft.draft_config.exit_layers[:1], num_draft_tokens=3)
decoder = SpeculativeDecoder(model, draft, config)
sampling = SamplingParams(temperature=temperature, max_new_tokens=new_tokens, ignore_eos=True)


def seconds_per_round(prompt) -> float:
    """Of the whole call: what is accepted does not matter."""
    chat = model.tokenizer.encode_chat([{"role": "user", "content": prompt}])
    started = time.perf_counter()
    stats = decoder.generate([chat], sampling).stats
    return (time.perf_counter() - started) / stats.target_forwards


for prompt in PROMPTS:  # compiles every bucket
    seconds_per_round(prompt)
print("rounds/s, median over prompts and three turns")
print(f"{1 / statistics.median(seconds_per_round(p) for _ in range(3) for p in PROMPTS):.3f}")
