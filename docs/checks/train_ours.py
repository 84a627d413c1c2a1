"""One SoFT step after the other with s2d-jax: the first 12 layers of SmolLM2, exits 6, 9, 12; prints tokens/s, the median.

Before that, the floating-point operations of the step against what the machine does in a large matrix product.

Usage: train_ours.py GGUF STEPS float32|bfloat16   (bfloat16: products over float32 weights)
"""

import statistics
import sys

import train_row as row
from train_step import RowStep, matmul_peak

from s2d_jax import load_model

path, steps, dtype = sys.argv[1], int(sys.argv[2]), sys.argv[3]
step = RowStep(load_model(path), row.EXITS, dtype)
loss, _ = step.run()
print(f"loss before training {loss:.4f}", flush=True)
runs = [step.run() for _ in range(steps)]
print(f"loss after {steps} further steps {runs[-1][0]:.4f}")
median = statistics.median(seconds for _, seconds in runs)
done, peak = step.operations / median, matmul_peak(dtype)
print(f"{done / 1e9:.1f} GFLOP/s, {done / peak:.0%} of a large product's {peak / 1e9:.1f}")
print(f"{row.LENGTH / median:.2f}")
