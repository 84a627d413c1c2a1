"""The SoFT step of train_ours.py with Hugging Face transformers and torch; prints tokens/s, the median over the steps.

Usage: train_hf.py GGUF STEPS float32|bfloat16   (bfloat16: autocast over float32 weights)
"""

import contextlib
import statistics
import sys
import time
from pathlib import Path

import torch
import train_row as row
from transformers import AutoModelForCausalLM

path, steps, dtype = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(2)
model = AutoModelForCausalLM.from_pretrained(
    str(path.parent), gguf_file=path.name, dtype=torch.float32, trust_remote_code=False
).train()
model.model.layers = model.model.layers[: row.EXITS[-1]]
model.config.num_hidden_layers = row.EXITS[-1]
model.config.use_cache = False
optimizer = torch.optim.AdamW(
    model.parameters(),
    lr=row.LEARNING_RATE,
    betas=row.BETAS,
    eps=row.EPSILON,
    weight_decay=0.0,
    fused=True,
)
counted = torch.from_numpy(row.COUNTED)
tokens = torch.from_numpy(row.TOKENS).long()[None]
targets = torch.from_numpy(row.TARGETS).long()[counted]


def precision():
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast("cpu", dtype=torch.bfloat16)


def step() -> float:
    with precision():
        states = model.model(tokens, output_hidden_states=True).hidden_states
        losses = []
        for depth in row.EXITS:
            h = states[depth][0, counted]
            # The last of the states has been through the norm already.
            normed = h if depth == row.EXITS[-1] else model.model.norm(h)
            logits = model.lm_head(normed).float()
            losses.append(torch.nn.functional.cross_entropy(logits, targets))
        loss = sum(losses) / len(losses)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), row.CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


print(f"loss before training {step():.4f}", flush=True)
seconds = []
for _ in range(steps):
    started = time.perf_counter()
    loss = step()
    seconds.append(time.perf_counter() - started)
print(f"loss after {steps} further steps {loss:.4f}")
print(f"{row.LENGTH / statistics.median(seconds):.2f}")
