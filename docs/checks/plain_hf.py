"""Plain greedy f32 decoding with Hugging Face transformers; prints tokens/s. Usage: plain_hf.py GGUF NEW_TOKENS"""

import sys
import time
from pathlib import Path

import torch
from prompts import PROMPTS
from transformers import AutoModelForCausalLM, AutoTokenizer

path, new_tokens = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(2)
source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
tokenizer = AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
model = AutoModelForCausalLM.from_pretrained(
    **source, dtype=torch.float32, trust_remote_code=False
).eval()


def generate(prompt):
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt"
    )
    ids = chat["input_ids"]
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    with torch.inference_mode():
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **length)


generate(PROMPTS[0])
started = time.perf_counter()
for prompt in PROMPTS:
    generate(prompt)
print(f"{len(PROMPTS) * new_tokens / (time.perf_counter() - started):.2f}")
