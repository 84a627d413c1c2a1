"""Real weights from prompt to text: SmolLM2 drafts for itself, and what comes out is what plain decoding says."""

from __future__ import annotations

import pytest

from s2d_jax.config import DecodeConfig, DraftConfig, SamplingParams, TreeShape
from s2d_jax.generation import SpeculativeDecoder
from s2d_jax.pretrained import Draft, load_model

PROMPTS = ["What is the capital of France?", "Write a function that adds two numbers."]
CONFIGS = {
    "chain": DecodeConfig(num_draft_tokens=3),
    "tree": DecodeConfig(tree=TreeShape(depth=3, top_k=4, nodes=12)),
}


@pytest.fixture(scope="module")
def target(smollm2_path):
    return load_model(smollm2_path)


@pytest.mark.weights
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_smollm2_says_what_it_says_without_a_draft(target, config):
    """Its layer 12 is seldom right and seldom sure, its last layer always right: both exits draft, tokens are lost and kept."""
    own = DraftConfig((12, target.config.num_layers), (0.9, 0.0))
    draft = Draft(target.config, target.params, target.tokenizer, "SmolLM2", own)
    decoder = SpeculativeDecoder(target, draft, config)
    reference = SpeculativeDecoder(target, None, DecodeConfig(verify_width=decoder.verify_width))
    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    sampling = SamplingParams(max_new_tokens=24)
    found, expected = decoder.generate(chats, sampling), reference.generate(chats, sampling)
    assert found.token_ids == expected.token_ids
    assert "Paris" in found.texts[0]
    assert all(1.5 < stats.mean_acceptance_length < 4.0 for stats in found.row_stats)
