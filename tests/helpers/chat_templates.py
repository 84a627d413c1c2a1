"""Chat templates in the forms of well-known models, written down for tests: what they do, without tools.

`{#[#}` and `{#]#}` are comments where the tags of Hugging Face's `return_assistant_tokens_mask` would stand around what the
assistant writes: its answer and its end-of-turn token.
"""

from __future__ import annotations

import dataclasses

import tokenizers
import transformers

from s2d_jax.text.templates import VICUNA_TEMPLATE
from s2d_jax.text.tokenizer import Tokenizer

_ROLES = "{% for m in messages %}"
_CHATML = (
    "{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}{#[#}{{ m.content + '<|im_end|>' }}{#]#}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_SYSTEM_FIRST = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A template, and the special tokens it writes; `eos` ends an answer."""

    text: str
    eos: str
    special: tuple[str, ...] = ()
    bos: str | None = None

    @property
    def tagged(self) -> str:
        """With the tags in place of the comments."""
        opened = self.text.replace("{#[#}", "{% generation %}")
        return opened.replace("{#]#}", "{% endgeneration %}")


APPENDING = {
    "ChatML": ChatTemplate(_ROLES + _CHATML, "<|im_end|>", ("<|im_start|>",)),
    "SmolLM2, a default system message": ChatTemplate(
        _ROLES + "{% if loop.first and m.role != 'system' %}"
        "{{ '<|im_start|>system\\nYou are SmolLM<|im_end|>\\n' }}{% endif %}" + _CHATML,
        "<|im_end|>",
        ("<|im_start|>",),
    ),
    "Qwen2.5, a default system message": ChatTemplate(
        "{%- if messages[0].role != 'system' %}\n{{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}\n{%- endif %}"
        + _ROLES
        + _CHATML,
        "<|im_end|>",
        ("<|im_start|>", "<|endoftext|>"),
    ),
    "Vicuna": ChatTemplate(
        VICUNA_TEMPLATE.replace(
            "{{ 'ASSISTANT: ' ~ message['content'] ~ eos_token }}",
            "{{ 'ASSISTANT:' }}{#[#}{{ ' ' ~ message['content'] ~ eos_token }}{#]#}",
        ),
        "</s>",
        bos="<s>",
    ),
    "Llama-2, strips": ChatTemplate(
        _SYSTEM_FIRST + "{% for m in turns %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m.role == 'user' %}{{ bos_token + '[INST] ' }}"
        "{% if loop.first and system %}{{ '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}{% endif %}"
        "{{ m.content.strip() + ' [/INST]' }}"
        "{% else %}{#[#}{{ ' ' + m.content.strip() + ' ' + eos_token }}{#]#}{% endif %}{% endfor %}",
        "</s>",
        bos="<s>",
    ),
    "Llama-3, trims": ChatTemplate(
        "{{- bos_token }}"
        + _ROLES
        + "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}"
        "{%- if m.role == 'assistant' %}{#[#}{{- m.content | trim + '<|eot_id|>' }}{#]#}"
        "{%- else %}{{- m.content | trim + '<|eot_id|>' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}",
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>"),
        bos="<|begin_of_text|>",
    ),
    "Mistral, the system message in the first question": ChatTemplate(
        "{{ bos_token }}" + _SYSTEM_FIRST + "{% for m in turns %}{% if m.role == 'user' %}"
        "{{ '[INST] ' }}{% if loop.first and system %}{{ system + '\\n\\n' }}{% endif %}{{ m.content + ' [/INST]' }}"
        "{% else %}{#[#}{{ ' ' + m.content + eos_token }}{#]#}{% endif %}{% endfor %}",
        "</s>",
        ("[INST]", "[/INST]"),
        bos="<s>",
    ),
    "Zephyr, strips": ChatTemplate(
        _ROLES
        + "{{ '<|' + m.role + '|>\\n' }}{% if m.role == 'assistant' %}{#[#}{{ m.content.strip() + eos_token }}"
        "{#]#}{% else %}{{ m.content.strip() + eos_token }}{% endif %}{{ '\\n' }}"
        "{% if loop.last and m.role == 'user' and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}",
        "</s>",
    ),
    "Gemma, merges the system message into a question": ChatTemplate(
        "{{ bos_token }}" + _SYSTEM_FIRST + "{% for m in turns %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}"
        "{% if loop.first and system %}{{ system + '\\n\\n' }}{% endif %}"
        "{% if m.role == 'assistant' %}{#[#}{{ m.content | trim + '<end_of_turn>' }}{#]#}"
        "{% else %}{{ m.content | trim + '<end_of_turn>' }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
        "<end_of_turn>",
        ("<start_of_turn>",),
        bos="<bos>",
    ),
    "Phi-3, an end of text behind the last turn": ChatTemplate(
        _ROLES
        + "{{ '<|' + m.role + '|>\\n' }}{% if m.role == 'assistant' %}{#[#}{{ m.content + '<|end|>' }}{#]#}"
        "{% else %}{{ m.content + '<|end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}",
        "<|end|>",
        ("<|user|>", "<|assistant|>", "<|system|>", "<|endoftext|>"),
    ),
}

QWEN3 = ChatTemplate(
    "{%- set ns = namespace(last=messages|length) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}"
    "{%- if m.role != 'assistant' %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- else %}"
    "{%- set thought = '' %}{%- set content = m.content %}"
    "{%- if '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if loop.index0 > ns.last %}{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{%- endif %}"
    "{{- content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}",
    "<|im_end|>",
    ("<|im_start|>", "<think>", "</think>"),
)

DEEPSEEK_R1 = ChatTemplate(
    "{{ bos_token }}" + _ROLES + "{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{% else %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}",
    "<|end|>",
    ("<|User|>", "<|Assistant|>"),
    bos="<|begin|>",
)

# The system message stands in the last question, wherever that is.
MISTRAL_NEMO = ChatTemplate(
    "{{- bos_token }}" + _SYSTEM_FIRST + "{%- for m in turns %}{%- if m.role == 'user' %}"
    "{{- '[INST]' }}{%- if loop.last and system %}{{- system + '\\n\\n' }}{%- endif %}{{- m.content + '[/INST]' }}"
    "{%- else %}{{- m.content + eos_token }}{%- endif %}{%- endfor %}",
    "</s>",
    ("[INST]", "[/INST]"),
    bos="<s>",
)

WITHOUT_END_OF_TURN = ChatTemplate(
    _ROLES + "{{ '### ' + m.role + ':\\n' + m.content + '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\\n' }}{% endif %}",
    "</s>",
)


def tokenizer_with(template: ChatTemplate, text: str | None = None) -> Tokenizer:
    """A lossless byte-level tokenizer with the template's special tokens."""
    rust = tokenizers.Tokenizer(tokenizers.models.BPE())
    rust.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    rust.train_from_iterator(
        ["one two three four five six the answer is user assistant\n\n"], trainer
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=rust,
        eos_token=template.eos,
        bos_token=template.bos,
        additional_special_tokens=list(template.special),
        chat_template=text or template.text,
    )
    return Tokenizer(fast)
