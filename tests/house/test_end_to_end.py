"""Real weights from prompt to text: SmolLM2 drafts for itself, and what comes out is what plain decoding says."""

from __future__ import annotations

import pytest

from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.draft import DraftConfig
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.config.tree import TreeShape
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.weights.load import load_model
from s2d_jax.weights.model import Draft

PROMPTS = ["What is the capital of France?", "Write a function that adds two numbers."]
# Both verify so many positions at a time: one reference serves both.
WIDTH = 6
CONFIGS = {
    "chain": DecodeConfig(num_draft_tokens=WIDTH - 1),
    "tree": DecodeConfig(tree=TreeShape(depth=3, top_k=3, nodes=WIDTH)),
}
CHATS = [[{"role": "user", "content": text}] for text in PROMPTS]
SAMPLING = SamplingParams(max_new_tokens=24)
CHAINS_ELSEWHERE = pytest.mark.exhaustive(
    "the tree takes the same weights through the same exits; on tiny models chains equal trees of one child each"
)


@pytest.fixture(scope="module")
def target(smollm2_path):
    return load_model(smollm2_path)


@pytest.fixture(scope="module")
def expected(target):
    reference = SpeculativeDecoder(target, None, DecodeConfig(verify_width=WIDTH))
    return reference.generate(CHATS, SAMPLING)


@pytest.mark.weights
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(CONFIGS["chain"], id="chain", marks=CHAINS_ELSEWHERE),
        pytest.param(CONFIGS["tree"], id="tree"),
    ],
)
def test_smollm2_says_what_it_says_without_a_draft(target, expected, config):
    """Its layer 12 is seldom right and seldom sure, its last layer always right: both exits draft, tokens are lost and kept."""
    own = DraftConfig((12, target.config.num_layers), (0.9, 0.0))
    draft = Draft(target.config, target.params, target.tokenizer, "SmolLM2", own)
    decoder = SpeculativeDecoder(target, draft, config)
    assert decoder.verify_width == WIDTH
    found = decoder.generate(CHATS, SAMPLING)
    assert found.token_ids == expected.token_ids
    assert "Paris" in found.texts[0]
    assert all(
        1.5 < stats.mean_acceptance_length < 1 + config.draft_width for stats in found.row_stats
    )
