"""What a target pass costs by its width, inside the decoding loop, beside the memory bandwidth of the same process.

Usage: width_cost.py MODEL [WIDTHS] [ROUNDS]   (default 1,2,4,6,8 and 5; medians of interleaved runs, f32, batch 1)
"""

import statistics
import sys
import time

import jax
import jax.numpy as jnp

from s2d_jax import DecodeConfig, SamplingParams, SpeculativeDecoder, load_model

TOKENS, READS = 16, 4
target = load_model(sys.argv[1])
widths = [int(w) for w in (sys.argv[2] if len(sys.argv) > 2 else "1,2,4,6,8").split(",")]
rounds = int(sys.argv[3]) if len(sys.argv) > 3 else 5
config, sampling = target.config, SamplingParams(max_new_tokens=TOKENS, ignore_eos=True)
layers = [
    leaf.size
    for name in target.params
    if "layers" in name
    for leaf in jax.tree.leaves(target.params[name])
]
read_bytes = 4 * (sum(layers) + config.vocab_size * config.embed_dim)


@jax.jit
def read(array):
    def one(_, total):
        array_, total = jax.lax.optimization_barrier((array, total))
        return total + jnp.sum(array_)

    return jax.lax.fori_loop(0, READS, one, jnp.float32(0))


def bandwidth(array) -> float:
    started = time.perf_counter()
    read(array).block_until_ready()
    return READS * array.nbytes / (time.perf_counter() - started) / 1e9


big = jnp.ones(1 << 27, jnp.float32)  # 512 MB
decoders = {w: SpeculativeDecoder(target, None, DecodeConfig(verify_width=w)) for w in widths}
milliseconds: dict[int, list[float]] = {w: [] for w in widths}
bandwidths = [bandwidth(big)]
for number in range(rounds + 1):
    bandwidths.append(bandwidth(big))
    for width, decoder in decoders.items():
        stats = decoder.generate([list(range(1, 9))], sampling, time_phases=True).stats
        if number:  # the first run compiles
            milliseconds[width].append(1e3 * stats.seconds["decode"] / stats.target_forwards)
best = statistics.median(bandwidths[2:])
print(f"memory bandwidth {best:.1f} GB/s; a pass reads {read_bytes / 1e9:.2f} GB")
plain = statistics.median(milliseconds[widths[0]])
for width in widths:
    spent = statistics.median(milliseconds[width])
    rate = read_bytes / spent / 1e6
    print(
        f"width {width}: {spent:.1f} ms, {spent / plain:.2f} of the first, {rate:.1f} GB/s ({rate / best:.0%})"
    )
