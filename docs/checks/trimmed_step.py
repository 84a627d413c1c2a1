"""What a step of a whole draft costs with its head read over all tokens and over a list: one compiled loop, interleaved.

Usage: trimmed_step.py DRAFT VOCABULARY.json [REPEATS]
"""

import statistics
import sys
import time

import jax
import jax.numpy as jnp

from s2d_jax import (
    DecodeConfig,
    SamplingParams,
    SpeculativeDecoder,
    load_draft,
    read_vocabulary,
    with_trimmed_head,
)

ROUNDS, DRAFTED = 4, 5
draft, vocabulary = load_draft(sys.argv[1]), read_vocabulary(sys.argv[2])
repeats = int(sys.argv[3]) if len(sys.argv) > 3 else 7
prompt = draft.tokenizer.encode("def fibonacci(n):")
sampling = SamplingParams(max_new_tokens=48, ignore_eos=True)


def compiled(draft):
    """A program of rounds that draft five tokens and forget them, and its arguments; the target is never run."""
    config = DecodeConfig(exits=(draft.config.num_layers,), num_draft_tokens=DRAFTED)
    decoder = SpeculativeDecoder(draft, draft, config)
    static, width, (params, request, tokens_BC, length_B) = decoder.prepare([prompt], sampling)
    params, drafter = params["draft"], static.drafter
    state = jax.jit(drafter.init, static_argnums=3)(params, tokens_BC, length_B, width)
    num_draft_B = jnp.array([DRAFTED], jnp.int32)

    def rounds(params, state, tokens_BC, request):
        def one(_, carry):
            state, token_B = carry
            proposal, state = drafter.propose(
                params, state, tokens_BC, length_B, num_draft_B, request.key_B, request, {}
            )
            return drafter.rewind(state, length_B - 1), token_B + proposal.tokens_BG[:, -1]

        return jax.lax.fori_loop(0, ROUNDS, one, (state, jnp.zeros(1, jnp.int32)))

    args = (params, drafter.rewind(state, length_B - 1), tokens_BC, request)
    return jax.jit(rounds).lower(*args).compile(), args


def milliseconds(program, args) -> float:
    started = time.perf_counter()
    jax.block_until_ready(program(*args))
    return 1e3 * (time.perf_counter() - started) / (ROUNDS * DRAFTED)


programs = {
    f"all {draft.config.vocab_size} tokens": compiled(draft),
    f"{vocabulary.size} listed tokens": compiled(with_trimmed_head(draft, vocabulary)),
}
figures = {name: [] for name in programs}
for repeat in range(repeats + 1):
    for name, (program, args) in programs.items():
        spent = milliseconds(program, args)
        if repeat:  # the first is the warm-up
            figures[name].append(spent)
medians = {name: statistics.median(column) for name, column in figures.items()}
for name, column in figures.items():
    print(f"{name}: {medians[name]:.1f} ms a step ({min(column):.1f} to {max(column):.1f})")
whole, listed = medians.values()
print(f"a step over the list is {whole / listed:.2f} times as fast")
