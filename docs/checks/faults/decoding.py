"""Faults of drafting, verification and acceptance."""

from __future__ import annotations

from faults.fault import Fault

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
        "decode/test_lossless.py -k follow_the_target[independent-sampled-fixed] --all",
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
        "keys_of([row.seed for row in padded])",
        "keys_of([rows[0].seed for _ in padded])",
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
        "drawn-from-parts",
        "tokens are drawn from the parts of a split draft's logits, so that groups of devices wait for each other",
        "s2d_jax/draft/segments.py",
        "logits_BTU = gathered_last(logits_BTU, mesh_in_use())",
        "logits_BTU = logits_BTU + 0",
        "model/test_decoding_over_data.py -k split_draft",
    ),
    Fault(
        "q-at-the-first-ids",
        "the q of a trimmed head is left at its first K ids",
        "s2d_jax/draft/logits.py",
        "return filled.at[..., ids_U].set(",
        "return filled.at[..., jnp.arange(len(ids_U))].set(",
        "decode/test_lossless.py -k 'follow_the_target and thresholds-sampled-fixed-trimmed' --all",
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
        "among, index_BY = buffer, start_B[:, None] + index_BY",
        "among, index_BY = buffer, start_B[:, None] + index_BY + (index_BY > 0)",
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
        "draft/test_draft_length.py -k has_caught_up --all",
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
        "return run_if(start_B[0] >= 0, write, buffers)",
        "return write(buffers)",
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
        "state, counters = fetch_whole((_without_caches(self._state), counters))",
        "state, counters = map(fetch_whole, (_without_caches(self._state), counters))",
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
