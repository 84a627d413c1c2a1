"""Tiny models: vocabulary 64 for properties, vocabulary 8 for exact enumeration."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from s2d_jax.config.draft import DraftConfig, ExitParts
from s2d_jax.config.model import ModelConfig

ENUMERABLE_VOCAB = 8
# Half as wide as other tiny models: tens of thousands of their continuations are drawn.
ENUMERABLE = {"embed_dim": 16, "ffw_dim": 24, "num_heads": 2, "num_kv_heads": 1}

TINY_TEXTS = (
    "the quick brown fox jumps over the lazy dog",
    "one two three four five six seven eight nine ten",
    "user asks and assistant answers",
)

TINY_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_config(vocab_size: int = 64, num_layers: int = 4, **changes) -> ModelConfig:
    """A Llama-family config of a few thousand parameters; `changes` replaces any field."""
    config = ModelConfig(
        family="llama",
        vocab_size=vocab_size,
        embed_dim=32,
        ffw_dim=48,
        num_layers=num_layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        norm_eps=1e-5,
        rope_theta=10_000.0,
        max_context=256,
    )
    return dataclasses.replace(config, **changes)


def tiny_qwen2_config(vocab_size: int = 64, num_layers: int = 4, **changes) -> ModelConfig:
    """The same shape in the Qwen2 family, with its biases on q, k and v."""
    return tiny_config(vocab_size, num_layers, family="qwen2", qkv_bias=True, **changes)


def tiny_params(config: ModelConfig, seed: int = 0, spread: float = 1.0):
    """Random f32 parameters of `config`.

    `spread` multiplies the matrices: above 1 the distributions become peaked and the exits
    disagree, as in a trained model; at 1 they are nearly uniform.
    """
    # Each caller gets arrays of its own, since training donates them.
    return jax.tree.map(jnp.array, _drawn_once(config, seed, spread))


@functools.cache
def _drawn_once(config: ModelConfig, seed: int, spread: float):
    """NumPy copies, drawn once per process by one program."""
    from s2d_jax.model.params import init_params

    drawn = jax.jit(lambda key: init_params(config, key, dtype=jnp.float32))
    params = jax.device_get(drawn(jax.random.key(seed)))
    return jax.tree.map(lambda x: x * np.float32(spread) if x.ndim == 2 else x, params)


def tiny_model(
    vocab_size: int = 64, num_layers: int = 4, *, seed: int = 0, spread: float = 1.0, **changes
):
    """A `Model` without a tokenizer."""
    from s2d_jax.weights.model import Model

    config = tiny_config(vocab_size, num_layers, **changes)
    return Model(config, tiny_params(config, seed, spread), None, f"tiny seed {seed}")


def tiny_draft(
    vocab_size: int = 64,
    exit_layers: tuple[int, ...] = (1, 2, 3),
    *,
    seed: int = 1,
    spread: float = 1.0,
    **changes,
):
    """A sorted `Draft` without a tokenizer, as deep as its last exit."""
    from s2d_jax.weights.model import Draft

    config = tiny_config(vocab_size, exit_layers[-1], **changes)
    params = tiny_params(config, seed, spread)
    return Draft(config, params, None, f"tiny draft seed {seed}", DraftConfig(exit_layers))


def with_parts(draft, parts: ExitParts, *, seed: int = 5, spread: float = 0.3):
    """The draft with parts of its exits that change what they read: as they begin, and noise; `spread` is of the adapters'."""
    from s2d_jax.model.exit_parts import init_exit_parts

    params = init_exit_parts(draft.config, draft.params, parts, jax.random.key(seed))
    keys = iter(jax.random.split(jax.random.key(seed + 1), len(jax.tree.leaves(params))))

    def noise(x, scale):
        return scale * jax.random.normal(next(keys), x.shape, x.dtype)

    for name in sorted(set(params) - set(draft.params)):
        scale = 0.05 if name.startswith("exit_heads") else spread
        params[name] = jax.tree.map(lambda x: x + noise(x, scale), params[name])  # noqa: B023
    draft_config = dataclasses.replace(draft.draft_config, parts=parts)
    return dataclasses.replace(draft, params=params, draft_config=draft_config)


def adapted(params, lora, seed: int = 7):
    """`params` with low-rank adapters on the trunk that matter."""
    from s2d_jax.model.lora import init_lora

    begun = init_lora(params, lora, jax.random.key(seed))
    keys = iter(jax.random.split(jax.random.key(seed + 1), len(jax.tree.leaves(begun))))

    def filled(path, x):
        if getattr(path[-1], "key", None) != "lora_b":
            return x
        return jax.device_put(0.3 * jax.random.normal(next(keys), x.shape, x.dtype), x.sharding)

    return jax.tree_util.tree_map_with_path(filled, begun)


def noisy_draft(target, exit_layers: tuple[int, ...], thresholds: tuple[float, ...], seed: int = 9):
    """The target with noise as its draft: often right, sometimes wrong, with exits that disagree."""
    from s2d_jax.weights.model import Draft

    noisy = with_noise(target.params, 0.02, seed)
    return Draft(target.config, noisy, None, "noisy", DraftConfig(exit_layers, thresholds))


def with_noise(params, scale: float, seed: int = 9):
    """`params` and normal noise of this size: one program draws all of it."""

    @jax.jit
    def noisy(params):
        keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(params))))
        return jax.tree.map(lambda x: x + scale * jax.random.normal(next(keys), x.shape), params)

    return noisy(params)


@functools.partial(jax.jit, static_argnums=(0, 3))
def logits_at_exits(config: ModelConfig, params, batch, exit_layers: tuple[int, ...]):
    """`[E, B, T, V]` of a training batch, through the shared norm and head."""
    from s2d_jax.model.transformer import Transformer

    model = Transformer(config)
    hiddens = model.apply(
        {"params": params},
        batch.tokens_BT,
        exit_layers=exit_layers,
        positions_BT=batch.positions_BT,
        segment_ids_BT=batch.segment_ids_BT,
        method="exit_hiddens",
    )
    return jnp.stack([model.apply({"params": params}, h, method="logits") for h in hiddens])


@contextlib.contextmanager
def compilations():
    """Yields a list that gets an entry for every program that JAX compiles meanwhile."""
    found = []

    def listen(event, *_, **__):
        if "backend_compile" in event:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def enumerable_model(num_layers: int = 2, *, seed: int = 0, spread: float = 4.0):
    """A `Model` whose vocabulary of 8 lets every continuation of three tokens be enumerated."""
    return tiny_model(ENUMERABLE_VOCAB, num_layers, seed=seed, spread=spread, **ENUMERABLE)


def enumerable_draft(exit_layers: tuple[int, ...] = (1, 2), *, seed: int = 1, spread: float = 4.0):
    """A sorted `Draft` of vocabulary 8."""
    return tiny_draft(ENUMERABLE_VOCAB, exit_layers, seed=seed, spread=spread, **ENUMERABLE)


def tiny_tokenizer(vocab_size: int = 64, *, chat: bool = True, texts: tuple[str, ...] = TINY_TEXTS):
    """A byte-level `Tokenizer` trained in memory; with `vocab_size` at least 262 it is lossless."""
    from tokenizers import Tokenizer as RustTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from s2d_jax.text.tokenizer import Tokenizer

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if vocab_size >= 262 else [],
    )
    rust.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=rust, eos_token="<|im_end|>", bos_token="<|endoftext|>"
    )
    if chat:
        fast.chat_template = TINY_CHAT_TEMPLATE
    return Tokenizer(fast)


def copies_of_what_is_kept(text: str, config: ModelConfig, batch: int) -> dict[str, list[str]]:
    """Copies in a compiled loop's text of what rounds keep in place, at a capacity of 128 and five drafted tokens."""
    kept = {
        "keys and values": f"f32[{batch},{config.num_kv_heads},128,{config.head_dim}]",
        "segment entries": f"f32[{batch},128,{config.embed_dim}]",
        "draft probabilities": f"f32[{batch},5,{config.vocab_size}]",
    }
    assert kept["keys and values"] in text
    pattern = r"= {}\S* copy\("
    found = {what: re.findall(pattern.format(re.escape(s)), text) for what, s in kept.items()}
    return {what: copies for what, copies in found.items() if copies}
