"""Records, on a target's own answers, what each exit of a draft would have contributed at every position."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from s2d_jax.calibration.trace import CHILDREN, AnswerTrace, Trace
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.draft.length import confidence
from s2d_jax.draft.logits import fit_vocabulary, over_all_ids
from s2d_jax.generation.buckets import bucket
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.model.transformer import apply_model
from s2d_jax.sampling import SamplingArrays, probabilities, top_k
from s2d_jax.weights.model import Draft, Model

BATCH = 8


def answer_prompts(
    target: Model, prompts: Sequence[list[int]], sampling: SamplingParams, on_batch: Callable
) -> list[list[int]]:
    """The target's own answers, token ids of prompt and answer together."""
    decoder, answers = SpeculativeDecoder(target), []
    for start in range(0, len(prompts), BATCH):
        batch = list(prompts[start : start + BATCH])
        rows = [*batch, *batch[:1] * (BATCH - len(batch))]
        new_ids = decoder.generate(rows, sampling).token_ids
        answers += [[*prompt, *ids] for prompt, ids in zip(batch, new_ids, strict=False)]
        on_batch(len(batch))
    return answers


def record_trace(
    target: Model,
    draft: Draft,
    sequences: Sequence[list[int]],
    prompt_lengths: Sequence[int],
    new_tokens: int,
    temperature: float,
    on_answer: Callable[[], None],
) -> Trace:
    """One teacher-forced pass of target and draft over each sequence.

    Args:
        sequences: prompt and answer.
        prompt_lengths: of each.
        new_tokens: at most so many of each answer.
        temperature: at which the answers were made; drafts are drawn at the same.
        on_answer: told after each.
    """
    width = bucket(max(len(ids) for ids in sequences))
    score = jax.jit(
        functools.partial(
            _score, target.transformer, draft.drafting_transformer, draft.draft_config.exit_layers
        ),
        static_argnums=(5,),
    )
    ids_K = None if draft.vocabulary is None else jnp.asarray(draft.vocabulary.ids_K)
    answers = []
    for number, (ids, prompt_length) in enumerate(zip(sequences, prompt_lengths, strict=True)):
        tokens_1T = np.zeros((1, width), np.int32)
        tokens_1T[0, : len(ids)] = ids
        # The first token is emitted by prefill, so the second one is the first that could have been drafted.
        first = prompt_length + 1
        count = min(len(ids), prompt_length + new_tokens) - first
        scored = score(
            target.params,
            draft.params,
            ids_K,
            jnp.asarray(tokens_1T),
            jnp.int32(first),
            new_tokens,
            jnp.float32(temperature),
        )
        if count > 0:
            sure_EN, accepted_EN, log_probs_ENK, rank_EN = (
                np.asarray(p)[:, :count] for p in scored
            )
            exact = sure_EN.astype(np.float64), accepted_EN.astype(np.float64)
            answers.append(AnswerTrace(number, *exact, log_probs_ENK, rank_EN))
        on_answer()
    return Trace(draft.draft_config.exit_layers, tuple(answers), new_tokens)


def _score(target, draft, exits, target_params, *rest):
    """What `AnswerTrace` keeps of each exit, `[E, N, ...]`, of N tokens from position `first` on."""
    draft_params, ids_K, tokens_1T, first, count, temperature = rest
    T = tokens_1T.shape[1]
    at_N = jnp.minimum(first + jnp.arange(count, dtype=jnp.int32), T - 1)
    emitted_N = tokens_1T[0, at_N]

    def hiddens(model, params, layers):
        return apply_model(model, params, "exit_hiddens", tokens_1T, exit_layers=layers)

    def logits_NV(model, params, h_1TD, exit_layer=None):
        return apply_model(model, params, "logits", h_1TD[0, at_N - 1], exit_layer)

    row = SamplingArrays(
        temperature_B=temperature[None],
        top_k_B=jnp.zeros(1, jnp.int32),
        top_p_B=jnp.ones(1, jnp.float32),
        min_p_B=jnp.zeros(1, jnp.float32),
    )

    def all_logits(own_NK):
        V = target.config.vocab_size
        return fit_vocabulary(over_all_ids(own_NK, ids_K, V, unlisted=-jnp.inf), V)

    def prob_N(logits_NV):
        probs_NV = probabilities(logits_NV[None], row)[0]
        return jnp.take_along_axis(probs_NV, emitted_N[:, None], axis=1)[:, 0]

    (h_1TD,) = hiddens(target, target_params, (target.config.num_layers,))
    target_prob_N = prob_N(logits_NV(target, target_params, h_1TD))
    recorded = []
    for exit_layer, h_1TD in zip(exits, hiddens(draft, draft_params, exits), strict=True):
        own_NK = logits_NV(draft, draft_params, h_1TD, exit_layer)
        draft_NV = all_logits(own_NK)
        draft_prob_N = prob_N(draft_NV)
        ratio_N = jnp.minimum(1.0, draft_prob_N / jnp.maximum(target_prob_N, 1e-30))
        # Greedy: the draft's distribution is one-hot, and what was emitted is what the target takes.
        accepted_N = jnp.where(temperature == 0.0, draft_prob_N, ratio_N)
        recorded.append((confidence(own_NK), accepted_N, *_children(draft_NV, emitted_N)))
    return tuple(jnp.stack(column) for column in zip(*recorded, strict=True))


def _children(logits_NV, emitted_N):
    """f32 `[N, K]` log-probabilities of the K most probable tokens, and int32 `[N]`, which of them was emitted; K if none."""
    K = min(CHILDREN, logits_NV.shape[1])
    best_NK, ids_NK = top_k(logits_NV, K)
    found_NK = ids_NK == emitted_N[:, None]
    rank_N = jnp.where(found_NK.any(axis=1), jnp.argmax(found_NK, axis=1).astype(jnp.int32), K)
    return best_NK - jax.nn.logsumexp(logits_NV, axis=1, keepdims=True), rank_N
