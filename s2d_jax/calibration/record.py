"""Records, on a target's own answers, what each exit of a draft would have contributed at every position."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from s2d_jax.calibration.timing import placed_beside
from s2d_jax.calibration.trace import CHILDREN, AnswerTrace, Trace
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.decode.programs import compile_part
from s2d_jax.draft.length import confidence
from s2d_jax.draft.logits import fit_vocabulary, over_all_ids
from s2d_jax.generation.buckets import bucket
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.model.transformer import apply_model
from s2d_jax.sampling import SamplingArrays, probabilities, top_k
from s2d_jax.sharding import fetch_whole
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
    """One teacher-forced pass of target and draft over each sequence; on a mesh, each group of devices passes over its own.

    Args:
        sequences: prompt and answer.
        prompt_lengths: tokens of each prompt.
        new_tokens: the most tokens of each answer that are recorded.
        temperature: of the answers; drafts are drawn at the same temperature.
        on_answer: called after each answer.
    """
    # The first token is emitted by prefill, so the second one is the first that could have been drafted.
    firsts = [length + 1 for length in prompt_lengths]
    passes = _passes(target, draft, sequences, firsts, new_tokens, temperature)
    answers = []
    for number, scored in enumerate(passes):
        count = min(len(sequences[number]), prompt_lengths[number] + new_tokens) - firsts[number]
        if count > 0:
            sure_ET, accepted_ET, log_probs_ETk, rank_ET = (p[:, :count] for p in scored)
            exact = sure_ET.astype(np.float64), accepted_ET.astype(np.float64)
            answers.append(AnswerTrace(number, *exact, log_probs_ETk, rank_ET))
        on_answer()
    return Trace(draft.draft_config.exit_layers, tuple(answers), new_tokens)


def _passes(
    target: Model,
    draft: Draft,
    sequences: Sequence[list[int]],
    firsts: Sequence[int],
    count: int,
    temperature: float,
) -> Iterator[tuple[np.ndarray, ...]]:
    """For each sequence what `_score` computes from `firsts` on, without the axis of rows."""
    placement, groups = placed_beside(target)
    params = {"target": target.device_params, "draft": placement.put_draft(draft.device_params)}
    if draft.vocabulary is not None:
        params |= placement.put({"listed_U": jnp.asarray(draft.vocabulary.ids_U)})
    exits = draft.draft_config.exit_layers
    score = functools.partial(_score, target.transformer, draft.drafting_transformer, exits, count)
    width = bucket(max(len(ids) for ids in sequences))
    compiled = None
    for start in range(0, len(sequences), groups):
        numbers = range(start, min(start + groups, len(sequences)))
        tokens_BC = np.zeros((groups, width), np.int32)
        first_B = np.ones(groups, np.int32)
        for row, number in enumerate(numbers):
            tokens_BC[row, : len(sequences[number])] = sequences[number]
            first_B[row] = firsts[number]
        temperature_B = np.full(groups, temperature, np.float32)
        arrays = map(jnp.asarray, (tokens_BC, first_B, temperature_B))
        inputs = (params, *map(placement.put, arrays))
        compiled = compiled or compile_part(score, inputs)
        scored = fetch_whole(compiled(*inputs))
        for row in range(len(numbers)):
            yield tuple(of_rows[row] for of_rows in scored)


def _score(target, draft, exits, count, params, tokens_1C, first_1, temperature_1):
    """What `AnswerTrace` keeps for each exit, `[1, E, T, ...]`, for `count` tokens from position `first_1` on.

    `target`, `draft`, `exits` and `count` are static. One row: a group of a mesh has no other.
    """
    target_params, draft_params, ids_U = params["target"], params["draft"], params.get("listed_U")
    C = tokens_1C.shape[1]
    at_T = jnp.minimum(first_1 + jnp.arange(count, dtype=jnp.int32), C - 1)
    emitted_T = tokens_1C[0, at_T]

    def hiddens(model, params, layers):
        return apply_model(model, params, "exit_hiddens", tokens_1C, exit_layers=layers)

    def logits_TV(model, params, h_1CD, exit_layer=None):
        return apply_model(model, params, "logits", h_1CD[0, at_T - 1], exit_layer)

    row = SamplingArrays(
        temperature_B=temperature_1,
        top_k_B=jnp.zeros(1, jnp.int32),
        top_p_B=jnp.ones(1, jnp.float32),
        min_p_B=jnp.zeros(1, jnp.float32),
    )

    def all_logits(own_TU):
        V = target.config.vocab_size
        return fit_vocabulary(over_all_ids(own_TU, ids_U, V, unlisted=-jnp.inf), V)

    def prob_T(logits_TV):
        probs_TV = probabilities(logits_TV[None], row)[0]
        return jnp.take_along_axis(probs_TV, emitted_T[:, None], axis=1)[:, 0]

    (h_1CD,) = hiddens(target, target_params, (target.config.num_layers,))
    target_prob_T = prob_T(logits_TV(target, target_params, h_1CD))
    recorded = []
    for exit_layer, h_1CD in zip(exits, hiddens(draft, draft_params, exits), strict=True):
        own_TU = logits_TV(draft, draft_params, h_1CD, exit_layer)
        draft_TV = all_logits(own_TU)
        draft_prob_T = prob_T(draft_TV)
        ratio_T = jnp.minimum(1.0, draft_prob_T / jnp.maximum(target_prob_T, 1e-30))
        # Greedy: the draft's distribution is one-hot, and the emitted token is the target's argmax.
        accepted_T = jnp.where(temperature_1 == 0.0, draft_prob_T, ratio_T)
        recorded.append((confidence(own_TU), accepted_T, *_children(draft_TV, emitted_T)))
    return tuple(jnp.stack(column)[None] for column in zip(*recorded, strict=True))


def _children(logits_TV, emitted_T):
    """f32 `[T, k]` log-probabilities of the k most probable tokens, and int32 `[T]`, which of them was emitted; k if none."""
    k = min(CHILDREN, logits_TV.shape[1])
    best_Tk, ids_Tk = top_k(logits_TV, k)
    found_Tk = ids_Tk == emitted_T[:, None]
    rank_T = jnp.where(found_Tk.any(axis=1), jnp.argmax(found_Tk, axis=1).astype(jnp.int32), k)
    return best_Tk - jax.nn.logsumexp(logits_TV, axis=1, keepdims=True), rank_T
