"""Greedy decoding of an f32 target with a calibrated policy; prints tokens/s.

Usage: pair_ours.py TARGET.gguf DRAFT.gguf QUESTIONS.jsonl PROMPTS NEW_TOKENS POLICY.json VOCABULARY.json DRAFT_FORMAT
"""

import sys
import time
from pathlib import Path

from s2d_jax import (
    DecodeConfig,
    SamplingParams,
    SpeculativeDecoder,
    load_draft,
    load_model,
    read_vocabulary,
    with_trimmed_head,
)
from s2d_jax.cli.prompts import read_questions

target, draft = load_model(sys.argv[1]), load_draft(sys.argv[2], weight_format=sys.argv[8])
questions = read_questions(Path(sys.argv[3]))[: int(sys.argv[4])]
draft = with_trimmed_head(draft, read_vocabulary(sys.argv[7]))
config = DecodeConfig(policy="auto", policy_file=sys.argv[6])
decoder = SpeculativeDecoder(target, draft, config)
sampling = SamplingParams(max_new_tokens=int(sys.argv[5]))
prompts = [target.tokenizer.encode_chat(question.messages([])) for question in questions]
for prompt in prompts:  # compiles every bucket
    decoder.warmup([len(prompt)], sampling=sampling)
started = time.perf_counter()
emitted = sum(decoder.generate([prompt], sampling).stats.emitted_tokens for prompt in prompts)
print(f"{emitted / (time.perf_counter() - started):.2f}")
