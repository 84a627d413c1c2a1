"""What a draft is before training: layers of a model, and the small parts that are added to it."""

from __future__ import annotations

import dataclasses

import jax
from jax.sharding import Mesh

from s2d_jax.config.model import ModelConfig
from s2d_jax.errors import UserError
from s2d_jax.model.exit_parts import init_exit_parts
from s2d_jax.model.lora import LoraConfig, init_lora
from s2d_jax.model.params import Params
from s2d_jax.model.select_layers import selected, truncated
from s2d_jax.sampling import keys_of
from s2d_jax.text.tokenizer import Tokenizer
from s2d_jax.weights.load import load_model
from s2d_jax.weights.vocabulary import DraftVocabulary, read_vocabulary
from train.config.sections import Config


@dataclasses.dataclass(frozen=True)
class Start:
    """A draft before its first step.

    Attributes:
        config: its shape.
        params: f32, with the small parts that the configuration asks for, which change nothing yet.
        tokenizer: that of the model that it starts from.
        vocabulary: the list of tokens that its heads are read over; None for all.
        notices: lines that a user should see about that model, its tokenizer and the list.
    """

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer
    vocabulary: DraftVocabulary | None
    notices: tuple[str, ...]


def load_start(config: Config, mesh: Mesh) -> Start:
    """Reads the model that the draft starts from, and makes the draft from it.

    Raises:
        UserError: if exits are deeper than the draft, rows longer than the context, the list is of another vocabulary, or there
            is no tokenizer.
    """
    section = config.model
    # Master weights are f32, whatever the model is stored in.
    template = config.data.chat_template
    model = load_model(section.path, weight_format="f32", mesh=mesh, chat_template=template)
    if section.layers:
        model_config, params = selected(model.config, model.params, section.layers)
    else:
        depth = section.num_layers or model.config.num_layers
        model_config, params = truncated(model.config, model.params, depth)
    config.check_exits(model_config.num_layers)
    if config.data.max_length > model_config.max_context:
        raise UserError(
            f"data.max_length={config.data.max_length} exceeds the model's context of "
            f"{model_config.max_context}; lower it"
        )
    if model.tokenizer is None:
        raise UserError(f"{section.path} has no tokenizer; add its tokenizer.json")
    vocabulary = None
    if config.draft.vocabulary is not None:
        vocabulary = read_vocabulary(config.draft.vocabulary)
        vocabulary.check(model_config.vocab_size, model.tokenizer)
    parts_key, lora_key = jax.random.split(keys_of([config.train.seed])[0])
    params = init_exit_parts(model_config, params, config.draft.parts, parts_key)
    if section.lora_rank:
        params = init_lora(params, LoraConfig(section.lora_rank), lora_key)
    listed = None if vocabulary is None else vocabulary.notice(model.tokenizer)
    told = [line for line in (model.tokenizer.template_notice, listed) if line is not None]
    notices = (*model.notices, *told)
    return Start(model_config, params, model.tokenizer, vocabulary, notices)
