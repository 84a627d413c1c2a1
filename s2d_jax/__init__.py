"""Sorted Speculative Decoding in JAX: one sorted draft makes many target models faster, without changing their output."""

from s2d_jax.compilation import use_compile_cache
from s2d_jax.config import (
    DecodeConfig,
    DraftConfig,
    ExitParts,
    ModelConfig,
    SamplingParams,
    TreeShape,
    UserError,
)
from s2d_jax.conversation import Conversation
from s2d_jax.draft_vocabulary import DraftVocabulary, read_vocabulary
from s2d_jax.export import export_draft, export_parts
from s2d_jax.generation import SpeculativeDecoder
from s2d_jax.lora import LoraConfig, load_peft, merge_lora
from s2d_jax.prepare import prepare_for_decode
from s2d_jax.pretrained import Draft, Model, load_draft, load_model, with_trimmed_head
from s2d_jax.sharding import MeshConfig, make_mesh
from s2d_jax.stats import GenerationStats
from s2d_jax.streaming import Delta, GenerationResult, Stream
from s2d_jax.tokenizer import Tokenizer

__all__ = [
    "Conversation",
    "DecodeConfig",
    "Delta",
    "Draft",
    "DraftConfig",
    "DraftVocabulary",
    "ExitParts",
    "GenerationResult",
    "GenerationStats",
    "LoraConfig",
    "MeshConfig",
    "Model",
    "ModelConfig",
    "SamplingParams",
    "SpeculativeDecoder",
    "Stream",
    "Tokenizer",
    "TreeShape",
    "UserError",
    "export_draft",
    "export_parts",
    "load_draft",
    "load_model",
    "load_peft",
    "make_mesh",
    "merge_lora",
    "prepare_for_decode",
    "read_vocabulary",
    "use_compile_cache",
    "with_trimmed_head",
]
