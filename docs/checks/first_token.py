"""Seconds from the start of a process to its first token, and to that of a second turn with and without caches of the first.

Usage: first_token.py GGUF CACHE_DIRECTORY   (run it twice: the second process finds its programs in the directory)
"""

import sys
import time

started = time.perf_counter()

from s2d_jax import SamplingParams, SpeculativeDecoder, load_model, use_compile_cache  # noqa: E402

use_compile_cache(sys.argv[2])
imported = time.perf_counter()
model = load_model(sys.argv[1])
loaded = time.perf_counter()
print(f"import {imported - started:.1f} s, weights {loaded - imported:.1f} s")

decoder = SpeculativeDecoder(model)
sampling = SamplingParams(max_new_tokens=64, ignore_eos=True)
story = "The lighthouse keeper wrote down what the sea did on every day of the year. " * 20


def first_token(start, *arguments):
    before = time.perf_counter()
    stream = start(*arguments, sampling)
    next(stream)
    seconds = time.perf_counter() - before
    for _ in stream:
        pass
    return seconds, stream.result


conversation = decoder.conversation()
turns = [{"role": "user", "content": story + "What does he do?"}]
seconds, result = first_token(conversation.stream, [turns])
now = time.perf_counter()
print(
    f"first token after {loaded - started + seconds:.1f} s, of which in this call {seconds:.1f} s"
)
print(
    f"64 tokens after {now - started:.1f} s; compiled or loaded for {result.stats.seconds['compile']:.1f} s"
)

turns += [{"role": "assistant", "content": result.texts[0]}, {"role": "user", "content": "Why?"}]
for name, start in (("with", conversation.stream), ("without", decoder.stream)):
    kept = start is conversation.stream
    first_token(start, [turns])  # compiles
    if kept:  # the same again, from the first turn's caches
        conversation.generate([turns[:1]], sampling)
    seconds, result = first_token(start, [turns])
    stats = result.stats
    print(
        f"second turn {name} caches: {stats.prefilled_tokens} of {stats.prompt_tokens} prompt tokens, "
        f"first token after {seconds:.3f} s"
    )
