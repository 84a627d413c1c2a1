"""Tiny models under the very paths that the documentation's Python blocks name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from hf_tiny import write_gguf
from tiny import TINY_CHAT_TEMPLATE, tiny_config, tiny_qwen2_config, tiny_tokenizer

from s2d_jax.config.draft import DraftConfig
from s2d_jax.config.model import ModelConfig
from s2d_jax.model.params import Params, abstract_params
from s2d_jax.weights.export import export_draft, save_model
from s2d_jax.weights.load import load_model
from s2d_jax.weights.model import Draft

VOCAB = 300
EXITS = (6, 9, 12)  # those that the text names


def write_models(folder: Path) -> None:
    """`models/` and `runs/demo/export` in `folder`: what `make demo` leaves, and the reader's own, all of one tokenizer."""
    models = folder / "models"
    models.mkdir()
    config = tiny_config(VOCAB, num_layers=1, max_context=512)
    gguf = models / "SmolLM2-135M-Instruct.Q4_1.gguf"
    write_gguf(gguf, config, drawn_params(config, 0), tokenizer=_vocabulary())
    demo = load_model(gguf)  # as in the demo, everything else takes its tokenizer
    shapes = {
        "small": demo.config,
        "large": demo.config,
        "Qwen2.5-Coder-0.5B": tiny_qwen2_config(VOCAB, num_layers=24),
    }
    for seed, (name, shape) in enumerate(shapes.items(), start=1):
        save_model(models / name, shape, drawn_params(shape, seed), demo.tokenizer)
    deep = dataclasses.replace(demo.config, num_layers=EXITS[-1])
    draft = Draft(deep, drawn_params(deep, 9), demo.tokenizer, "tiny", DraftConfig(EXITS))
    export_draft(draft, folder / "runs/demo/export", {})


def drawn_params(config: ModelConfig, seed: int) -> Params:
    """Random f32 parameters, drawn without a program; vectors are 1."""
    rng = np.random.default_rng(seed)

    def drawn(x):
        if len(x.shape) == 1:
            return np.ones(x.shape, np.float32)
        return rng.normal(0, 2 / np.sqrt(x.shape[-1]), x.shape).astype(np.float32)

    return jax.tree.map(drawn, abstract_params(config, jnp.float32))


def _vocabulary() -> dict[str, object]:
    """The tokenizer of `tiny_tokenizer` under GGUF's keys."""
    fast = tiny_tokenizer(VOCAB)._fast
    ids = fast.get_vocab()
    tokens = sorted(ids, key=lambda token: ids[token])
    special = set(fast.all_special_tokens) | {"<|im_start|>"}
    merges = json.loads(fast.backend_tokenizer.to_str())["model"]["merges"]
    return {
        "ggml.model": "gpt2",
        "ggml.pre": "gpt-2",
        "ggml.tokens": tokens,
        "ggml.token_type": [3 if token in special else 1 for token in tokens],
        "ggml.merges": [" ".join(pair) for pair in merges],
        "ggml.bos_token_id": ids["<|endoftext|>"],
        "ggml.eos_token_id": ids["<|im_end|>"],
        "chat_template": TINY_CHAT_TEMPLATE,
    }
