"""Greedy assisted generation in bf16 with Hugging Face transformers; prints tokens/s.

Usage: pair_hf.py TARGET.gguf DRAFT.gguf QUESTIONS.jsonl PROMPTS NEW_TOKENS
"""

import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

target_path, draft_path, questions = (Path(argument) for argument in sys.argv[1:4])
count, new_tokens = int(sys.argv[4]), int(sys.argv[5])
torch.set_num_threads(2)


def source(path):
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


def load(path):
    return AutoModelForCausalLM.from_pretrained(
        **source(path), dtype=torch.bfloat16, trust_remote_code=False
    ).eval()


tokenizer = AutoTokenizer.from_pretrained(**source(target_path), trust_remote_code=False)
target, draft = load(target_path), load(draft_path)
rows = [json.loads(line) for line in questions.read_text(encoding="utf-8").splitlines()[:count]]


def generate(row):
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": row["turns"][0]}],
        add_generation_prompt=True,
        return_tensors="pt",
    )
    ids = chat["input_ids"]
    with torch.inference_mode():
        done = target.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
            assistant_model=draft,
        )
    return done.shape[1] - ids.shape[1]


generate(rows[0])
started = time.perf_counter()
emitted = sum(generate(row) for row in rows)
print(f"{emitted / (time.perf_counter() - started):.2f}")
