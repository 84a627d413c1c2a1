"""The faults that `planted_faults.py` plants: wrong rules that run, each with the tests that must notice.

`old` stands exactly once in `file`. `tests` is a file of `tests/`, with `-k` where a few of its tests say it sooner. What tests
plant themselves (a rule, a gradient, a damaged file, a disk that refuses) has its counterpart here.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Fault:
    """One change of the source.

    Attributes:
        name: for the command line.
        what: what is then done wrong.
        file: from the root of the project.
        old, new: what is replaced, by what.
        tests: which must fail.
    """

    name: str
    what: str
    file: str
    old: str
    new: str
    tests: str


ACCEPTANCE = [
    Fault(
        "accept-always",
        "every drafted token that is possible at all is accepted",
        "s2d_jax/decode/acceptance.py",
        "accept_BG = u_BG * draft_prob_BG < target_prob_BG",
        "accept_BG = target_prob_BG > 0.0",
        "decode/test_acceptance.py",
    ),
    Fault(
        "residual-not-clipped",
        "the residual is p - q, negative entries included",
        "s2d_jax/decode/acceptance.py",
        "residual_BV = jnp.maximum(p_BV - q_BV, 0.0)",
        "residual_BV = p_BV - q_BV",
        "decode/test_acceptance.py",
    ),
    Fault(
        "bonus-from-q",
        "when all drafted tokens are accepted, the bonus token is drawn from the draft's q",
        "s2d_jax/decode/acceptance.py",
        "next_probs_BV = jnp.where(use_residual_B[:, None], residual_BV, p_BV)",
        """next_probs_BV = jnp.where(use_residual_B[:, None], residual_BV, p_BV)
    all_accepted_B = (num_accepted_B > 0) & ~rejected_B
    next_probs_BV = jnp.where(all_accepted_B[:, None], q_BV, next_probs_BV)""",
        "decode/test_lossless.py -k 'follow_the_target and thresholds-sampled-heuristic'",
    ),
    Fault(
        "soft-q-for-modes",
        "the most probable token is drafted, and tested with the soft q",
        "s2d_jax/draft/chain.py",
        "return sample(probs_BU, key_B), probs_BU",
        "return jnp.argmax(probs_BU, axis=-1).astype(jnp.int32), probs_BU",
        "decode/test_lossless.py -k follow_the_target[thresholds-sampled-fixed]",
    ),
    Fault(
        "improbable-drafts-dropped",
        "a drawn token is dropped for its own low probability",
        "s2d_jax/draft/chain.py",
        "proposal = _append(proposal, i, token_B, exit_B, probs_BU, live_B)",
        """if probs_BU is not None:
            own_B = jnp.take_along_axis(probs_BU, index_B[:, None], axis=1)[:, 0]
            live_B = live_B & (own_B > 0.2)
        proposal = _append(proposal, i, token_B, exit_B, probs_BU, live_B)""",
        "decode/test_lossless.py -k follow_the_target[independent-sampled-fixed]",
    ),
    Fault(
        "rounds-share-random-numbers",
        "every round of a row uses the same random numbers",
        "s2d_jax/decode/loop.py",
        "return split(fold_in(request.key_B, state.length_B), 2)",
        "return split(fold_in(request.key_B, jnp.zeros_like(state.length_B)), 2)",
        "decode/test_lossless.py -k follow_the_target[thresholds-sampled-fixed]",
    ),
]

SAMPLING = [
    Fault(
        "rows-share-a-seed",
        "all rows draw with the seed of the first",
        "s2d_jax/generation/planner.py",
        "keys_of([row.seed for row in rows])",
        "keys_of([rows[0].seed for _ in rows])",
        "decode/test_decoder.py -k gives_each_row_its_seed",
    ),
    Fault(
        "last-kept-token-dropped",
        "top-k and top-p drop the last token that they should keep",
        "s2d_jax/sampling.py",
        "kept_BTV = jnp.where(bits_BTV >= low_BT[:, :, None], probs_BTV, 0.0)",
        "kept_BTV = jnp.where(bits_BTV > low_BT[:, :, None], probs_BTV, 0.0)",
        "draft/test_sampling.py -k filters",
    ),
    Fault(
        "min-p-ignored",
        "min-p keeps everything",
        "s2d_jax/sampling.py",
        "jnp.where(probs_BTV >= floor_BT1, probs_BTV, 0.0)",
        "jnp.where(floor_BT1 >= 0.0, probs_BTV, 0.0)",
        "draft/test_sampling.py -k filters",
    ),
    Fault(
        "temperature-before-maximum",
        "logits are divided by the temperature before their maximum is taken away",
        "s2d_jax/sampling.py",
        "below_BTV = logits_BTV - jnp.max(logits_BTV, axis=-1, keepdims=True)",
        "below_BTV = logits_BTV",
        "draft/test_sampling.py -k leaves_only_the_mode",
    ),
    Fault(
        "seeds-of-32-bits",
        "seeds that differ in their upper 32 bits draw the same samples",
        "s2d_jax/sampling.py",
        "[[seed >> 32, seed & 0xFFFFFFFF]",
        "[[0, seed & 0xFFFFFFFF]",
        "draft/test_sampling.py -k seeds_of_64_bits",
    ),
    Fault(
        "steps-as-drafted-tokens",
        "the histogram of exits counts the draft's steps, not the tokens that it drafted",
        "s2d_jax/generation/stream.py",
        "zip(exits, proposed_E, strict=True)",
        "zip(exits, steps, strict=True)",
        "generation/test_origins.py -k agrees_with_confidences",
    ),
    Fault(
        "temperature-in-confidence",
        "whether a token leaves at an exit depends on the temperature of the request",
        "s2d_jax/draft/segments.py",
        "sure_BT = jnp.bool_(last) | (confidence(logits_BTU) > request.exit_threshold_E[s])",
        """warm_B = jnp.where(request.sampling.temperature_B == 0, 1.0, request.sampling.temperature_B)
        warm_BTU = logits_BTU / warm_B[:, None, None]
        sure_BT = jnp.bool_(last) | (confidence(warm_BTU) > request.exit_threshold_E[s])""",
        "tree/test_tree_rounds.py -k 'drawn_children and filtered'",
    ),
    Fault(
        "q-at-the-first-ids",
        "the q of a trimmed head is left at its first K ids",
        "s2d_jax/draft/logits.py",
        "return filled.at[..., ids_U].set(",
        "return filled.at[..., jnp.arange(len(ids_U))].set(",
        "decode/test_lossless.py -k 'follow_the_target and thresholds-sampled-fixed-trimmed'",
    ),
]

TREES = [
    Fault(
        "tree-q-short-of-one",
        "after a refusal q loses the token, and is not normalised again",
        "s2d_jax/tree/acceptance.py",
        "draft_probs_BV=_where(refuse_B, _norm(without_BV, without_BV), q_BV),",
        "draft_probs_BV=_where(refuse_B, without_BV, q_BV),",
        "tree/test_tree_acceptance.py -k keep_the_targets_law",
    ),
    Fault(
        "tree-q-keeps-the-refused",
        "after a refusal q keeps the refused token",
        "s2d_jax/tree/acceptance.py",
        "without_BV = jnp.where(jnp.arange(V)[None, :] == token_B[:, None], 0.0, q_BV)",
        "without_BV = q_BV",
        "tree/test_tree_acceptance.py -k keep_the_targets_law",
    ),
    Fault(
        "tree-p-keeps-the-refused",
        "after a refusal p stays as it was",
        "s2d_jax/tree/acceptance.py",
        "target_probs_BV=_where(refuse_B, _norm(jnp.maximum(p_BV - q_BV, 0.0), p_BV), p_BV),",
        "target_probs_BV=p_BV,",
        "tree/test_tree_acceptance.py -k keep_the_targets_law",
    ),
    Fault(
        "tree-walks-greedily",
        "a tree of most probable children follows the target's argmax at any temperature",
        "s2d_jax/tree/acceptance.py",
        "return sample(probs_BV, fold_in(key_B, node_B))",
        "return jnp.argmax(probs_BV, axis=-1).astype(jnp.int32)",
        "tree/test_tree_acceptance.py -k most_probable_children",
    ),
    Fault(
        "drawn-children-reranked",
        "drawn children are ranked by their own probability",
        "s2d_jax/tree/growth.py",
        "score_BJ[:, :, None] + best_BJk, -jnp.inf)",
        "score_BJ[:, :, None] + own_BJk, -jnp.inf)",
        "decode/test_lossless.py -k follow_the_target[thresholds-sampled-tree]",
    ),
    Fault(
        "drawn-children-sorted",
        "drawn children are taken in the order of their ids, not as drawn",
        "s2d_jax/tree/growth.py",
        "index_BJk = draw(probs_BJU, key_B, self.shape.top_k)",
        "index_BJk = jnp.sort(draw(probs_BJU, key_B, self.shape.top_k), axis=-1)",
        "decode/test_lossless.py -k follow_the_target[thresholds-sampled-tree]",
    ),
    Fault(
        "siblings-seen",
        "a node of the tree looks at its elder siblings",
        "s2d_jax/tree/nodes.py",
        "    found_BMM = at_BM[:, :, None] == node_M[None, None, :]\n",
        """    elder_BMM = parent_BM[:, :, None] == parent_BM[:, None, :]
    elder_BMM &= (node_M[:, None] > node_M[None, :])[None]
    found_BMM = (at_BM[:, :, None] == node_M[None, None, :]) | elder_BMM
""",
        "tree/test_nodes_and_growth.py -k ancestors",
    ),
    Fault(
        "neighbour-kept",
        "of an accepted path the caches keep the entries one place further on",
        "s2d_jax/model/kv_cache.py",
        "(start_B[:, None] + index_BY).reshape(shape)",
        "(start_B[:, None] + index_BY + (index_BY > 0)).reshape(shape)",
        "tree/test_nodes_and_growth.py -k paths",
    ),
    Fault(
        "unseen-path-kept",
        "a deeper segment keeps an accepted path also where it never computed it",
        "s2d_jax/draft/segments.py",
        "kept_BY = (slot_BY >= 0) & (root_B[:, None] + slot_BY < cache.length_B[:, None])",
        "kept_BY = slot_BY >= 0",
        "tree/test_tree_rounds.py -k 'every_round and [s2d]'",
    ),
]

DRAFTING = [
    Fault(
        "catch-up-one-late",
        "a segment that catches up starts one position late",
        "s2d_jax/draft/segments.py",
        "chunk = read_window(source, cache.length_B, width)",
        "chunk = read_window(source, cache.length_B + 1, width)",
        "draft/test_catch_up.py",
    ),
    Fault(
        "rewind-lengthens",
        "rewinding sets lengths instead of clipping them",
        "s2d_jax/model/kv_cache.py",
        "return self.replace(length_B=jnp.minimum(self.length_B, length_B))",
        "return self.replace(length_B=length_B)",
        "draft/test_catch_up.py",
    ),
    Fault(
        "bonus-token-unread",
        "a draft takes a token for read that it has not read, where two wait",
        "s2d_jax/model/prefill.py",
        "jnp.minimum(length_B + width, end_B)",
        "jnp.minimum(length_B + width + 1, end_B)",
        "decode/test_decoder.py -k its_own_draft",
    ),
    Fault(
        "returning-draft-behind",
        "a draft that returns after plain rounds has not read their tokens",
        "s2d_jax/draft/sorted.py",
        "state, _ = segments.catch_up(params, state, 0, tokens_BC, end_B, self.return_width)",
        "state = state.replace(segments=(state.segments[0].advance_to(jnp.maximum(state.segments[0].length_B, "
        "end_B)), *state.segments[1:]))",
        "draft/test_draft_length.py -k has_caught_up",
    ),
    Fault(
        "guard-forgets-drafting",
        "the guard does not charge what drafting cost",
        "s2d_jax/draft/guard.py",
        "saved_B = emitted_B - drafting.verify_cost_Y[num_draft_B] - guard.spent_B",
        "saved_B = emitted_B - drafting.verify_cost_Y[num_draft_B]",
        "draft/test_draft_length.py -k guards_loss",
    ),
]

DECODING = [
    Fault(
        "states-of-refused-nodes",
        "the states of the target that a drafter sees are not moved with a tree's accepted path",
        "s2d_jax/model/kv_cache.py",
        "return self.replace(keys=keys, values=values, states=states)\n\n    def grow(",
        "return self.replace(keys=keys, values=values)\n\n    def grow(",
        "decode/test_target_states.py -k tree",
    ),
    Fault(
        "stop-tokens-ignored",
        "a stop token does not end its row",
        "s2d_jax/decode/loop.py",
        "done_B=state.done_B | stopped_B | (length_B >= request.max_length_B)",
        "done_B=state.done_B | (length_B >= request.max_length_B)",
        "decode/test_decoder.py -k stop_tokens_end",
    ),
    Fault(
        "one-token-too-many",
        "a row may draft as many tokens as it may emit",
        "s2d_jax/decode/loop.py",
        "jnp.minimum(state.draft_length_B, affordable_B), budget_B - 1)",
        "jnp.minimum(state.draft_length_B, affordable_B), budget_B)",
        "decode/test_decoder.py -k few_new_tokens",
    ),
    Fault(
        "only-row-written-bare",
        "the one row of a batch is written without the condition that keeps XLA from copying its cache",
        "s2d_jax/model/kv_cache.py",
        "return run_if(start_B[0] >= 0, write_only_row, buffer)",
        "return write_only_row(buffer)",
        "decode/test_decoder.py -k 'no_cache_is_copied and independent'",
    ),
    Fault(
        "conditions-copy",
        "what may be left out in a round is a branch, which copies the caches that it carries",
        "s2d_jax/model/conditional.py",
        "return jax.lax.while_loop(lambda state: state[0], once, (predicate, carry))[1]",
        "return jax.lax.cond(predicate, body, lambda carry: carry, carry)",
        "decode/test_decoder.py -k 'no_cache_is_copied and independent'",
    ),
    Fault(
        "every-length-compiled",
        "every length of a prompt has a program of its own",
        "s2d_jax/generation/plan.py",
        "return chunk_width(new, self.prefill_chunk)",
        "return min(new, self.prefill_chunk)",
        "decode/test_decoder.py -k second_prompt",
    ),
    Fault(
        "host-asks-twice",
        "the host fetches state and counters one after the other",
        "s2d_jax/generation/session.py",
        "self._look = Look(*jax.device_get((_without_caches(self._state), counters)))",
        "self._look = Look(*map(jax.device_get, (_without_caches(self._state), counters)))",
        "decode/test_decoder.py -k host_is_asked_once",
    ),
    Fault(
        "other-story-believed",
        "a prompt is served by caches of the same length, whatever they hold",
        "s2d_jax/generation/session.py",
        "kept.append(int(differs.argmax()) if differs.any() else count)",
        "kept.append(count)",
        "generation/test_session.py -k later_turn_equals",
    ),
    Fault(
        "caches-overrun",
        "rounds go on until a cache is full to its last position",
        "s2d_jax/decode/loop.py",
        "return jnp.all(state.length_B + self.margin <= state.tokens_BC.shape[1])",
        "return jnp.all(state.length_B < state.tokens_BC.shape[1])",
        "generation/test_session.py -k caches_grow",
    ),
    Fault(
        "origin-one-exit-too-early",
        "a token is recorded as drafted by the exit before the one that drafted it",
        "s2d_jax/decode/verifier.py",
        "return append_next(exit_BG + 1, num_accepted_B, jnp.zeros_like(num_accepted_B))",
        "return append_next(exit_BG, num_accepted_B, jnp.zeros_like(num_accepted_B))",
        "generation/test_origins.py -k equal_their_replay",
    ),
    Fault(
        "origin-one-token-too-early",
        "who chose a token is recorded at the token before",
        "s2d_jax/decode/loop.py",
        "origin_BC=write_window(state.origin_BC, origin_BY, state.length_B, axis=1)",
        "origin_BC=write_window(state.origin_BC, origin_BY, state.length_B - 1, axis=1)",
        "generation/test_origins.py -k equal_their_replay",
    ),
    Fault(
        "a-text-is-many-prompts",
        "a text is answered letter by letter",
        "s2d_jax/text/prompts.py",
        "if (one := one_prompt(prompts)) is not None:",
        "if (one := one_prompt(prompts)) is not None and not isinstance(prompts, str):",
        "text/test_prompts.py",
    ),
    Fault(
        "score-of-the-token-itself",
        "a token is scored by the logits after it instead of those before",
        "s2d_jax/weights/score.py",
        "next_BW = read_window(tokens_BC, start_B + 1, width)",
        "next_BW = read_window(tokens_BC, start_B, width)",
        "weights/test_score.py -k scores_are_those_of_torch",
    ),
]

TEXT = [
    Fault(
        "half-characters",
        "a stream gives out characters of which bytes are missing",
        "s2d_jax/text/tokenizer.py",
        r'return self.decode(ids).rstrip("\N{REPLACEMENT CHARACTER}")',
        "return self.decode(ids)",
        "text/test_detokenizer.py",
    ),
    Fault(
        "stop-strings-begun",
        "a stream gives out what may be the beginning of a stop string",
        "s2d_jax/text/detokenizer.py",
        "text = text[: len(text) - self._held_back(text)]",
        "text = text[:]",
        "text/test_detokenizer.py",
    ),
    Fault(
        "words-taken-for-padding",
        "whatever one vocabulary has more than the other is taken for padding",
        "s2d_jax/text/pairing.py",
        "if i > shared and extra is not None and _PADDING.fullmatch(extra):",
        "if i > shared and extra is not None:",
        "text/test_pairing.py -k more_entries",
    ),
    Fault(
        "damaged-tokenizer-believed",
        "a damaged tokenizer.model is left to transformers, which takes it for tiktoken's",
        "s2d_jax/text/tokenizer_files.py",
        """    if not file.exists():
        return
    check_no_lfs""",
        """    if file.exists():
        return
    check_no_lfs""",
        "text/test_sentencepiece.py -k not_sentencepieces",
    ),
    Fault(
        "class-over-tokenizer-json",
        "a directory's tokenizer is rebuilt from the class that tokenizer_config.json names",
        "s2d_jax/text/tokenizer_files.py",
        """    if (directory / "tokenizer.json").exists():
        rebuilt""",
        """    if not (directory / "tokenizer_config.json").exists():
        rebuilt""",
        "text/test_directories.py -k counts_and_not_the_class",
    ),
    Fault(
        "code-of-a-directory",
        "Python code in a model's directory is run",
        "s2d_jax/text/tokenizer_files.py",
        "trust_remote_code=False",
        "trust_remote_code=True",
        "text/test_directories.py -k never_run",
    ),
    Fault(
        "pairs-by-entries-only",
        "tokenizers of equal entries pass, whatever they make of texts",
        "s2d_jax/text/pairing.py",
        "if ours != theirs:",
        "if len(ours) > 0 and not theirs:",
        "text/test_pairing.py -k another_pipeline",
    ),
    Fault(
        "two-beginnings",
        "a text that begins with BOS gets a second one",
        "s2d_jax/text/tokenizer.py",
        "return ids if ids[: len(before)] == before else [*before, *ids]",
        "return [*before, *ids]",
        "text/test_beginnings.py -k one_bos",
    ),
    Fault(
        "teachers-read-what-they-lack",
        "rows with tokens that a teacher has no embedding for are taken",
        "train/run/teachers.py",
        "    check_rows(rows, model.config.vocab_size, tokenizer, path)\n",
        "",
        "infer/test_commands_and_tokenizers.py -k beyond_an_embedding",
    ),
    Fault(
        "lists-of-other-rules",
        "a list is taken that was counted with a tokenizer of other rules",
        "s2d_jax/weights/vocabulary.py",
        "if self.behaviour_sha256 not in (None, behaviour_hash(tokenizer)):",
        "if self.behaviour_sha256 == '':",
        "infer/test_commands_and_tokenizers.py -k other_rules",
    ),
]

MODELS = [
    Fault(
        "queries-of-other-groups",
        "query heads share the keys of another group",
        "s2d_jax/model/attention.py",
        "q_BTNH.reshape(B, T, K, Q, H).transpose(0, 2, 3, 1, 4)",
        "q_BTNH.reshape(B, T, Q, K, H).transpose(0, 3, 2, 1, 4)",
        "model/test_model.py -k equals_numpy",
    ),
    Fault(
        "llama3-factors-ignored",
        "the RoPE scaling of Llama-3 is ignored",
        "s2d_jax/model/attention.py",
        "    if scaling is None:\n        return frequency",
        "    if scaling is None or scaling.factor > 1.0:\n        return frequency",
        "weights/test_load.py -k 'logits_equal and llama3'",
    ),
    Fault(
        "documents-see-back",
        "a packed document sees those before it",
        "s2d_jax/model/transformer.py",
        "(segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])",
        "(segment_ids_BT[:, :, None] >= segment_ids_BT[:, None, :])",
        "model/test_model.py -k segments",
    ),
    Fault(
        "parts-not-read",
        "drafting reads every exit through what all exits share",
        "s2d_jax/weights/model.py",
        "return Transformer(self.config, self.dtype, size, self.draft_config.parts)",
        "return Transformer(self.config, self.dtype, size)",
        "model/test_exit_parts.py -k follows_the_definition",
    ),
    Fault(
        "last-digit-lost",
        "int8 products leave out the second digit of the activations",
        "s2d_jax/model/products/forms.py",
        "(first_AO * 256 + last_AO) * step_A1",
        "(first_AO * 256) * step_A1",
        "model/test_weight_formats.py -k definition",
    ),
    Fault(
        "scales-split-like-inputs",
        "the scales of an int8 weight are split over devices as its inputs are",
        "s2d_jax/model/products/weight_formats.py",
        "jax.sharding.PartitionSpec(*sharding.spec[:1])",
        "jax.sharding.PartitionSpec(*sharding.spec[1:2])",
        "model/test_weight_formats.py -k onto_a_mesh",
    ),
    Fault(
        "weights-widened-once",
        "XLA may convert bf16 weights to f32 before the decoding loop, and hold both",
        "s2d_jax/model/products/forms.py",
        "tied, start = jax.lax.optimization_barrier((values, i * rows))",
        "tied, start = values, i * rows",
        "model/test_weight_formats.py -k no_f32_copy",
    ),
    Fault(
        "gguf-rows-interleaved",
        "the rows of q and k in a GGUF file are taken as they lie",
        "s2d_jax/weights/stored.py",
        "return weight if num_heads is None else unpermute_rope_rows(weight, num_heads)",
        "return weight",
        "formats/test_gguf.py -k reads_back",
    ),
]

FILES = [
    Fault(
        "cut-gguf-accepted",
        "a GGUF file may end inside its last tensor",
        "s2d_jax/formats/gguf_header.py",
        "if start + num_bytes > len(self.buffer):",
        "if start > len(self.buffer):",
        "formats/test_gguf.py -k truncated_file",
    ),
    Fault(
        "cut-safetensors-untold",
        "a truncated safetensors file ends in a traceback",
        "s2d_jax/formats/safetensors.py",
        "except (safetensors.SafetensorError, OSError) as error:",
        "except OSError as error:",
        "weights/test_load.py -k truncated_weights",
    ),
    Fault(
        "nan-accepted",
        "weights with NaN in them are loaded",
        "s2d_jax/formats/safetensors.py",
        "check_finite(name, array, self._paths[name])",
        "pass",
        "weights/test_broken_models.py -k a_model_with_nan",
    ),
    Fault(
        "shards-from-anywhere",
        "an index may name files outside the model's directory",
        "s2d_jax/formats/shards.py",
        'return not path.is_absolute() and ".." not in path.parts',
        "return True",
        "weights/test_broken_models.py -k names_nothing_outside",
    ),
    Fault(
        "parts-in-any-order",
        "a part of a GGUF file under the name of another is read",
        "s2d_jax/formats/gguf.py",
        "if own != (number, count):",
        "if own[1] != count:",
        "formats/test_gguf_damaged.py -k belong_together",
    ),
    Fault(
        "zeros-behind-the-vocabulary",
        "a padded vocabulary ends in rows of zeros",
        "s2d_jax/weights/pad_vocabulary.py",
        "more_VD = jnp.broadcast_to(table_VD[row], (count, table_VD.shape[1]))",
        "more_VD = jnp.zeros((count, table_VD.shape[1]), table_VD.dtype)",
        "weights/test_pad_vocabulary.py -k unused_token",
    ),
    Fault(
        "pissa-believed",
        "adapters whose beginning was taken out of the base are read as plain ones",
        "s2d_jax/weights/peft.py",
        "if not any(begun is plain or begun == plain for plain in _PEFT_PLAIN_BEGINNINGS):",
        "if False:",
        "model/test_lora.py -k files_that_cannot_be_read",
    ),
    Fault(
        "own-head-dropped",
        "a head that differs from the embedding is dropped where the config calls it tied",
        "s2d_jax/weights/stored.py",
        "if not np.array_equal(source.read(LM_HEAD.hf), source.read(EMBEDDING.hf)):",
        "if source.shapes[LM_HEAD.hf] != source.shapes[EMBEDDING.hf]:",
        "weights/test_load.py -k tied_head",
    ),
    Fault(
        "half-an-export-left",
        "an export that the disk refused leaves its half behind",
        "s2d_jax/weights/export.py",
        """    finally:
        shutil.rmtree(partial, ignore_errors=True)
""",
        "    finally:\n",
        "weights/test_export.py -k 'leaves_nothing and disk'",
    ),
    Fault(
        "earlier-export-lost",
        "an export that cannot be renamed takes the earlier one with it",
        "s2d_jax/weights/export.py",
        """            if old.exists():
                old.rename(out)
            raise""",
        "            raise",
        "weights/test_export.py -k failed_rename",
    ),
    Fault(
        "half-a-file-left",
        "a file that the disk refused is left under its temporary name",
        "s2d_jax/files.py",
        "partial.unlink(missing_ok=True)",
        "partial.exists()",
        "infer/test_infer_generate.py -k full_disk",
    ),
    Fault(
        "another-base-believed",
        "a draft takes any model under the name of its base",
        "s2d_jax/weights/load.py",
        "if not seen.matches(base.fingerprint):",
        "if not base.fingerprint:",
        "model/test_lora.py -k missing_or_another",
    ),
    Fault(
        "lora-scale-missing",
        "the adapters of PEFT are read without their scale",
        "s2d_jax/weights/peft.py",
        "factors[name.ours] = (a_RI, b_OR * np.float32(scale))",
        "factors[name.ours] = (a_RI, b_OR)",
        "model/test_lora.py -k there_and_back",
    ),
]

DATA = [
    Fault(
        "mask-one-late",
        "the loss counts the positions of an answer's tokens, not those before them",
        "train/data/batches.py",
        '"weights": ahead(answer) & same_document & (indices >= 0)[:, None],',
        '"weights": answer & same_document & (indices >= 0)[:, None],',
        "train/test_data.py -k rows_hold",
    ),
    Fault(
        "cut-off-teaches-the-end",
        "an answer that was cut off teaches an end of turn",
        "train/data/documents.py",
        "limit = answer.content_end if answer.cut_off else _shared_length(text, answer.text)",
        "limit = _shared_length(text, answer.text)",
        "train/test_data.py -k cut_off",
    ),
    Fault(
        "rows-overfull",
        "a document goes to a row that lacks one place for it",
        "train/data/packing.py",
        "for r in range(length, capacity + 1) if with_room[r]",
        "for r in range(length - 1, capacity + 1) if with_room[r]",
        "train/test_data.py -k packing",
    ),
    Fault(
        "held-out-rows-trained-on",
        "rows that are held out are trained on as well",
        "train/data/batches.py",
        "return np.sort(order[held_out:]), np.sort(order[:held_out])",
        "return np.sort(order), np.sort(order[:held_out])",
        "train/test_data.py -k held_out",
    ),
    Fault(
        "another-line-named",
        "a corrupt row is named by the line before it",
        "s2d_jax/files.py",
        'enumerate(text.split("\\n"), start=1)',
        'enumerate(text.split("\\n"), start=0)',
        "train/test_data.py -k corrupt_row",
    ),
    Fault(
        "damaged-rows-believed",
        "saved rows are read whatever their hashes say",
        "train/data/cache.py",
        "if _file_hash(directory / name) != known:",
        "if not (directory / name).is_file():",
        "train/test_data_cache.py -k damaged_rows",
    ),
    Fault(
        "rows-of-another-template",
        "rows in the cache are found under another chat template",
        "s2d_jax/text/tokenizer.py",
        """            self._fast.backend_tokenizer.to_str(),
            self.chat_template,
""",
        "            self._fast.backend_tokenizer.to_str(),\n",
        "train/test_data_cache.py -k key_depends",
    ),
    Fault(
        "growing-source-believed",
        "rows of a file that grew while it was read are kept",
        "train/data/rows.py",
        "if cache_key(config, tokenizer) != key:",
        "if not cache_key(config, tokenizer):",
        "train/test_data_cache.py -k grows",
    ),
    Fault(
        "half-an-entry-left",
        "an entry of the cache that the disk refused is left half written",
        "train/data/cache.py",
        "        finally:\n            shutil.rmtree(partial, ignore_errors=True)",
        "        finally:\n            partial.exists()",
        "train/test_data_cache.py -k full_disk",
    ),
]

TRAINING = [
    Fault(
        "exit-weights-ignored",
        "all exits weigh the same in the loss",
        "train/objective/sorted_loss.py",
        "shares = tuple(weight / sum(exit_weights) for weight in exit_weights)",
        "shares = tuple(1 / len(exit_weights) for _ in exit_weights)",
        "train/test_losses.py",
    ),
    Fault(
        "gradient-of-one-chunk",
        "the gradient by the states is kept for one chunk of positions only",
        "train/objective/sorted_loss.py",
        "hidden_grad_EBCD = walk.put(i, hidden_grad_EBCD, grads[1])",
        "hidden_grad_EBCD = walk.put(0, hidden_grad_EBCD, grads[1])",
        "train/test_losses.py -k gradient_equals",
    ),
    Fault(
        "divergences-swapped",
        "forward and reverse KL change places",
        "train/objective/exit_reader.py",
        "return tuple(cut)",
        "return tuple(cut)[::-1]",
        "train/test_train_objectives.py -k distillation_is",
    ),
    Fault(
        "gradient-rows-mixed-up",
        "the gradient of a bf16 product pairs rows with those of others",
        "s2d_jax/model/products/mixed.py",
        "blocks.transpose(2, 0, 1)",
        "blocks.transpose(2, 1, 0)",
        "model/test_mixed_product.py -k product_and_gradients",
    ),
    Fault(
        "products-widened",
        "the gradient of a bf16 product is a product of f32 copies",
        "s2d_jax/model/products/mixed.py",
        "jax.lax.optimization_barrier(blocks.transpose(2, 0, 1)).reshape(channels, rows)",
        "blocks.reshape(rows, channels).T",
        "model/test_mixed_product.py -k widened",
    ),
    Fault(
        "frozen-trunk-learns",
        "where only small parts shall learn, the trunk learns too",
        "train/objective/trainable.py",
        "for path, value in flat.items() if part_of(path) in parts}",
        'for path, value in flat.items() if part_of(path) in (*parts, "trunk")}',
        "train/test_train_objectives.py -k only_the_named_part",
    ),
    Fault(
        "heads-look-across-documents",
        "Medusa's heads learn tokens of the next document",
        "train/medusa.py",
        "weights.append(_ahead(batch.weights_BT, k) * same_document.astype(jnp.float32))",
        "weights.append(_ahead(batch.weights_BT, k))",
        "train/test_medusa.py -k borders",
    ),
    Fault(
        "bonus-forgotten",
        "acceptance on held-out rows forgets the target's own token",
        "train/run/implied_acceptance.py",
        "at, rounds = at + accepted + 1, rounds + 1",
        "at, rounds = at + max(accepted, 1), rounds + 1",
        "train/test_evaluate.py",
    ),
]

SHARDING = [
    Fault(
        "moments-everywhere",
        "every device holds all of the optimizer's moments",
        "s2d_jax/sharding.py",
        "lambda _, sharding: sharding,",
        "lambda _, sharding: replicated(mesh),",
        "train/test_sharded_training.py -k hold_an_eighth",
    ),
    Fault(
        "activations-left-to-xla",
        "activations are split as XLA likes",
        "s2d_jax/sharding.py",
        'return jax.lax.with_sharding_constraint(x, partition_spec(("batch",)))',
        "return x",
        "train/test_sharded_training.py -k activations",
    ),
]

RUNS = [
    Fault(
        "resume-omits-a-batch",
        "a resumed run leaves out the batch behind its checkpoint",
        "train/run/setup.py",
        "        step=step,\n        elapsed=",
        "        step=step + 1,\n        elapsed=",
        "train/test_train_run.py -k resumed_run_repeats",
    ),
    Fault(
        "untried-parameters-saved",
        "a checkpoint is written without a look at what its parameters give",
        "train/run/loop.py",
        'self._check_finite(metrics, f"after the update of step {self.step}")',
        "del metrics",
        "train/test_train_run.py -k nan_stops",
    ),
    Fault(
        "preempted-unsaved",
        "a run that SIGTERM ends does not save first",
        "train/run/loop.py",
        "if due or stopped:",
        "if due and not stopped:",
        "train/test_survival.py -k sigterm",
    ),
    Fault(
        "damage-untold",
        "a damaged checkpoint ends in a traceback",
        "s2d_jax/weights/checkpoints.py",
        "raise self.damaged(step, _root(error), abstract) from error",
        "raise",
        "weights/test_broken_runs.py -k newest_checkpoint_that_is_whole",
    ),
    Fault(
        "killed-save-left",
        "what a killed save left stays for ever",
        "s2d_jax/weights/checkpoints.py",
        "cleanup_tmp_directories=keep is not None,",
        "cleanup_tmp_directories=False,",
        "weights/test_checkpoint.py -k killed_save",
    ),
    Fault(
        "failed-save-left",
        "a save that the disk refused leaves its half behind",
        "s2d_jax/weights/checkpoints.py",
        "            steps = self.steps\n            self._abandon_save()\n",
        "            steps = self.steps\n",
        "weights/test_checkpoint.py -k full_disk",
    ),
    Fault(
        "failed-start-left",
        "a start that the disk refused leaves the directory of the run",
        "train/run/setup.py",
        "for path in [run_dir] if before is None",
        "for path in [] if before is None",
        "train/test_train_run.py -k refuses_leaves_nothing",
    ),
    Fault(
        "files-written-in-place",
        "files are written under their own name, so a refusal leaves them cut",
        "s2d_jax/files.py",
        "        yield partial\n        os.replace(partial, path)",
        "        yield path",
        "train/test_survival.py -k metrics_outlive",
    ),
    Fault(
        "others-end-otherwise",
        "when one process fails, the others end with another status",
        "train/run/processes.py",
        "os._exit(int(status))",
        "os._exit(1)",
        "train/test_processes.py -k failure_of_one_process",
    ),
]

CALIBRATION = [
    Fault(
        "policy-of-any-machine",
        "a policy is found on other machines than it was measured on",
        "s2d_jax/generation/policy.py",
        'fields = ("target", "draft", "formats", "device", "temperature_class")',
        'fields = ("target", "draft", "formats", "temperature_class")',
        "calibration/test_calibration.py -k policies_are_kept",
    ),
    Fault(
        "fingerprint-of-shapes",
        "models of one shape have one fingerprint",
        "s2d_jax/weights/fingerprint.py",
        "digest.update(name.encode() + values.tobytes())",
        "digest.update(name.encode())",
        "calibration/test_calibration.py -k fingerprints",
    ),
    Fault(
        "replay-drafts-one-more",
        "a replayed chain may be as long as what is left to emit",
        "s2d_jax/calibration/replay.py",
        "most = min(limit, total - at - 1)",
        "most = min(limit, total - at)",
        "calibration/test_calibration.py -k by_hand",
    ),
]

COMMANDS = [
    Fault(
        "brackets-are-markup",
        "what is shown is read as markup",
        "s2d_jax/cli/screen.py",
        "super().__init__(markup=False, emoji=False,",
        "super().__init__(markup=True, emoji=False,",
        "cli/test_plain_screen.py -k shown_as_they_are",
    ),
    Fault(
        "outputs-not-tried",
        "outputs are not tried before work begins",
        "s2d_jax/cli/outputs.py",
        '        with contextlib.suppress(FileExistsError), probe.open("xb") as file:',
        '        with contextlib.suppress(FileExistsError, OSError), probe.open("xb") as file:',
        "cli/test_outputs.py -k told_in_a_line",
    ),
    Fault(
        "unicode-ends-rows",
        "line ends of Unicode inside JSON texts end a row",
        "s2d_jax/files.py",
        'enumerate(text.split("\\n"), start=1)',
        "enumerate(text.splitlines(), start=1)",
        "text/test_messages.py -k only_a_line_feed",
    ),
    Fault(
        "tools-trained-on",
        "what a tool said is trained on as an answer",
        "s2d_jax/text/messages.py",
        '"model", "bot", "ai"',
        '"model", "bot", "tool"',
        "text/test_messages.py -k left_out_by_reason",
    ),
    Fault(
        "mistakes-with-status-1",
        "a user's mistake ends a command with status 1",
        "s2d_jax/cli/command.py",
        'return 2, f"error: ',
        'return 1, f"error: ',
        "infer/test_infer_generate.py -k as_a_process",
    ),
    Fault(
        "other-settings-believed",
        "a killed run goes on under other settings",
        "infer/generate/journal.py",
        "if before != now:",
        "if begun.keys() != settings.keys():",
        "infer/test_regenerate.py -k other_settings",
    ),
    Fault(
        "cut-off-called-finished",
        "answers that were cut off are called finished",
        "infer/generate/answering.py",
        "[not set(stop_ids).isdisjoint(answer.token_ids[-1:]) for answer in answers]",
        "[True for _ in answers]",
        "infer/test_infer_generate.py -k cut_off",
    ),
]

FAULTS = [
    *(*ACCEPTANCE, *SAMPLING, *TREES, *DRAFTING, *DECODING, *TEXT, *MODELS, *FILES),
    *(*DATA, *TRAINING, *SHARDING, *RUNS, *CALIBRATION, *COMMANDS),
]
