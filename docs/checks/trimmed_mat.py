"""Mean acceptance length with a draft's head read over all tokens and over lists of tokens, and whether output is the same.

Usage: trimmed_mat.py TARGET DRAFT QUESTIONS.jsonl NEW_TOKENS TEMPERATURE VOCABULARY.json ...   (all prompts in one batch)
"""

import sys
from pathlib import Path

from s2d_jax import (
    SamplingParams,
    SpeculativeDecoder,
    load_draft,
    load_model,
    read_vocabulary,
    with_trimmed_head,
)
from s2d_jax.cli.prompts import read_questions

target, draft = load_model(sys.argv[1]), load_draft(sys.argv[2])
questions = read_questions(Path(sys.argv[3]))
prompts = [target.tokenizer.encode_chat(question.messages([])) for question in questions]
sampling = SamplingParams(temperature=float(sys.argv[5]), max_new_tokens=int(sys.argv[4]))
lists = {"all tokens": None, **{path: read_vocabulary(path) for path in sys.argv[6:]}}
first = None
for name, vocabulary in lists.items():
    decoder = SpeculativeDecoder(target, with_trimmed_head(draft, vocabulary))
    result = decoder.generate(prompts, sampling)
    stats = result.stats
    first = first or result
    same = sum(a == b for a, b in zip(result.token_ids, first.token_ids, strict=True))
    print(
        f"{name}: {draft.config.vocab_size if vocabulary is None else vocabulary.size} tokens, "
        f"MAT {stats.mean_acceptance_length:.3f}, {stats.mean_acceptance_length / first.stats.mean_acceptance_length:.3f} "
        f"of the first, accepted {stats.accepted_per_depth} of {stats.drafted_per_depth}, "
        f"{stats.emitted_tokens} tokens, {same} of {len(prompts)} answers equal to the first",
        flush=True,
    )
