"""Plain greedy f32 decoding with s2d-jax; prints tokens/s. Usage: plain_ours.py GGUF NEW_TOKENS"""

import sys
import time

from prompts import PROMPTS

from s2d_jax import SamplingParams, SpeculativeDecoder, load_model

path, new_tokens = sys.argv[1], int(sys.argv[2])
model = load_model(path)
decoder = SpeculativeDecoder(model)
sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)


def generate(prompt):
    chat = model.tokenizer.encode_chat([{"role": "user", "content": prompt}])
    result = decoder.generate([chat], sampling)
    assert result.stats.emitted_tokens == new_tokens
    return result


for prompt in PROMPTS:  # compiles every bucket
    generate(prompt)
started = time.perf_counter()
for prompt in PROMPTS:
    generate(prompt)
print(f"{len(PROMPTS) * new_tokens / (time.perf_counter() - started):.2f}")
