"""Tiny sorted drafts as exported, and their logits at every exit here and in Hugging Face torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from hf_tiny import CASES
from tiny import tiny_params, tiny_tokenizer

from s2d_jax.config.draft import DraftConfig
from s2d_jax.model.transformer import Transformer
from s2d_jax.weights.model import Draft

MAX_ABS = 2e-4


EXITS = DraftConfig((1, 2, 4), (0.6, 0.5, 0.0))


VOCABULARY = 270  # of the tiny tokenizer: every byte and a few merges


def make_draft(name: str = "llama", dtype=jnp.float32) -> Draft:
    """A random sorted draft of one of the CASES, four layers deep, with a tokenizer."""
    tokenizer = tiny_tokenizer(VOCABULARY)
    stop_ids = tokenizer.stop_token_ids
    config = dataclasses.replace(
        CASES[name], vocab_size=VOCABULARY, bos_token_id=0, eos_token_ids=stop_ids
    )
    params = jax.tree.map(lambda x: x.astype(dtype), tiny_params(config, spread=5.0))
    return Draft(config, params, tokenizer, "tiny", EXITS)


def hf_load(directory: Path):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", trust_remote_code=False
    )
    return model.eval()


def exit_logits(draft: Draft, exits: Sequence[int | None], tokens_BT: np.ndarray) -> dict:
    """By exit; None is the full depth with what all exits share. One program computes all."""
    model = Transformer(draft.config, parts=draft.draft_config.parts)
    layers = sorted({depth or draft.config.num_layers for depth in exits})

    @jax.jit
    def run(variables, tokens):
        hiddens = model.apply(variables, tokens, exit_layers=tuple(layers), method="exit_hiddens")
        states = dict(zip(layers, hiddens, strict=True))
        return [
            model.apply(variables, states[depth or layers[-1]], depth, method="logits")
            for depth in exits
        ]

    found = jax.device_get(run({"params": draft.params}, jnp.asarray(tokens_BT)))
    return dict(zip(exits, found, strict=True))


def files_in(directory: Path) -> set[str]:
    return {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()}
