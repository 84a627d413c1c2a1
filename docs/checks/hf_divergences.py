"""Where Hugging Face transformers, given the same prefix, would pick another token than plain decoding did.

Usage: hf_divergences.py GGUF FILE.json   (the file that greedy_identity.py wrote; f32, one forward pass per prompt)
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

path, report = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
model = AutoModelForCausalLM.from_pretrained(
    str(path.parent), gguf_file=path.name, dtype=torch.float32, trust_remote_code=False
).eval()

total, divergences = 0, []
for number, (prompt, emitted) in enumerate(
    zip(report["prompts"], report["tokens"]["ar"], strict=True)
):
    with torch.inference_mode():
        logits_TV = model(torch.tensor([prompt + emitted])).logits[0, len(prompt) - 1 : -1]
    best = logits_TV.topk(2, dim=-1)
    total += len(emitted)
    for at, token in enumerate(emitted):
        if int(best.indices[at, 0]) != token:
            margin = float(best.values[at, 0] - best.values[at, 1])
            divergences.append((number, at, margin))
print(f"{len(divergences)} of {total} tokens differ from HF's argmax after the same prefix")
for number, at, margin in divergences:
    print(f"prompt {number} position {at}: HF's top-2 margin {margin:.2e}")
