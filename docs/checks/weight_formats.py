"""What bf16 and int8 weights change: logits, perplexity on the demo's prompts, bytes, memory while loading.

Usage: weight_formats.py MODEL [MAX_TOKENS]
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from s2d_jax import load_model
from s2d_jax.decode.target import Target
from s2d_jax.model.products.weight_formats import WEIGHT_FORMATS, weight_bytes
from s2d_jax.model.transformer import Transformer

PROMPTS = Path(__file__).parent.parent.parent / "configs" / "demo_prompts_train.jsonl"
WINDOW, STEP = 256, 4
LOAD = """
import re, sys, jax
from s2d_jax import load_model
peak_kb = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak_kb()
jax.block_until_ready(load_model(sys.argv[1], weight_format=sys.argv[2]).params)
print((peak_kb() - before) / 1024)
"""


def windows_of(tokenizer, max_tokens: int) -> np.ndarray:
    """int32 `[N, 1, WINDOW]`: the prompts, one behind the other; what does not fill a window is left out."""
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    ids = tokenizer.encode("\n\n".join(json.loads(line)["prompt"] for line in lines))[:max_tokens]
    count = len(ids) // WINDOW
    return np.array(ids[: count * WINDOW], np.int32).reshape(count, 1, WINDOW)


def whole(model):
    """Logits `[1, WINDOW, V]` in one pass: the form of long windows."""
    apply = jax.jit(Transformer(model.config, dtype=model.dtype).apply)
    return lambda window: np.asarray(apply({"params": model.params}, jnp.asarray(window)))


def decoded(model):
    """The same through the cache, STEP positions a pass: the form of verification."""
    target = Target(Transformer(model.config, dtype=model.dtype))

    @functools.partial(jax.jit, donate_argnums=2)
    def step(params, tokens_1T, cache):
        h_1TD, cache = target.forward(params, tokens_1T, cache)
        return target.logits(params, h_1TD), cache.advance_to(cache.length_B + STEP)

    def run(window):
        cache, parts = target.new_cache(1, WINDOW), []
        for start in range(0, WINDOW, STEP):
            tokens_1T = jnp.asarray(window[:, start : start + STEP])
            logits_1TV, cache = step(model.params, tokens_1T, cache)
            parts.append(np.asarray(logits_1TV))
        return np.concatenate(parts, axis=1)

    return run


def negative_log_likelihoods(logits_1TV, window) -> np.ndarray:
    log_probs_TV = np.asarray(jax.nn.log_softmax(jnp.asarray(logits_1TV[0, :-1]), axis=-1))
    return -np.take_along_axis(log_probs_TV, window[0, 1:, None], axis=1)[:, 0]


def peak_megabytes(path: str, weight_format: str) -> float:
    """How much loading adds to the largest resident size of a process of its own (Linux; a mapped GGUF file counts)."""
    command = [sys.executable, "-c", LOAD, path, weight_format]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main(path: str, max_tokens: int) -> None:
    expected, perplexities, sizes = {}, {}, {}
    print("format | MB | of f32 | peak MB | perplexity | of f32 | pass | max | rms | top-1 same")
    for weight_format in WEIGHT_FORMATS:
        peak = peak_megabytes(path, weight_format)
        model = load_model(path, weight_format=weight_format)
        windows = windows_of(model.tokenizer, max_tokens)
        size = sizes[weight_format] = weight_bytes(model.params) / 1e6
        run, losses, kept = whole(model), [], []
        for number, window in enumerate(track(windows, weight_format)):
            logits_1TV = run(window)
            losses.append(negative_log_likelihoods(logits_1TV, window))
            kept += [logits_1TV] * (number == 0)
        perplexity = perplexities[weight_format] = float(np.exp(np.concatenate(losses).mean()))
        found = {"whole": kept[0], f"{STEP} a pass": decoded(model)(windows[0])}
        expected = expected or found
        for form, logits_1TV in found.items():
            difference = logits_1TV - expected[form]
            same = (logits_1TV.argmax(-1) == expected[form].argmax(-1)).mean()
            print(
                f"{weight_format} | {size:.1f} | {size / sizes['f32']:.3f} | {peak:.0f} | {perplexity:.4f} | "
                f"{perplexity / perplexities['f32']:.4f} | {form} | {np.abs(difference).max():.4f} | "
                f"{np.sqrt((difference**2).mean()):.4f} | {same:.3f}",
                flush=True,
            )
        del model, run
    print(
        f"{windows.size} tokens; logits of {WINDOW} of them, standard deviation {expected['whole'].std():.2f}"
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 2048)
