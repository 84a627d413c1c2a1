"""What a drafted token costs in S2D by the exit it leaves at: the same compiled round, with thresholds that force each exit.

Usage: exit_cost.py TARGET DRAFT [REPEATS]
"""

import statistics
import sys

from s2d_jax import DecodeConfig, SamplingParams, SpeculativeDecoder, load_draft, load_model

target, draft = load_model(sys.argv[1]), load_draft(sys.argv[2])
repeats = int(sys.argv[3]) if len(sys.argv) > 3 else 5
exits = draft.draft_config.exit_layers
prompt = target.tokenizer.encode_chat([{"role": "user", "content": "Describe a walk by the sea."}])
sampling = SamplingParams(max_new_tokens=48, ignore_eos=True)
decoders = {}
for index, layer in enumerate(exits):  # a threshold of 1 is never passed, one of 0 always
    thresholds = (*(1.0 for _ in exits[:index]), *(0.0 for _ in exits[index:]))
    config = DecodeConfig(exit_thresholds=thresholds)
    decoders[layer] = SpeculativeDecoder(target, draft, config)

figures = {layer: [] for layer in exits}
for _ in range(repeats):
    for layer, decoder in decoders.items():
        stats = decoder.generate([prompt], sampling).stats
        assert stats.exit_histogram[layer] == stats.drafted_tokens
        seconds = decoder.generate([prompt], sampling, time_rounds=True).stats.seconds["draft"]
        figures[layer].append(1e3 * seconds / stats.drafted_tokens)
deepest = statistics.median(figures[exits[-1]])
for layer, column in figures.items():
    cost = statistics.median(column)
    print(f"exit {layer:2d}: {cost:6.2f} ms a drafted token, {cost / deepest:.2f} of the deepest")
