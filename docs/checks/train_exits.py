"""What three exits cost in training: SoFT steps (exits 6, 9, 12) and SFT steps (exit 12) in turn, in one process.

The ratio of their seconds stands beside that of their floating-point operations (blocks + exits x head, forward and backward).

Usage: train_exits.py GGUF STEPS
"""

import statistics
import sys

import train_row as row
from rich.progress import track
from rich.table import Table
from train_step import RowStep, matmul_peak

from s2d_jax import load_model
from s2d_jax.cli.screen import screen

path, count = sys.argv[1], int(sys.argv[2])
model = load_model(path)
steps = [RowStep(model, exits, "float32") for exits in (row.EXITS, row.EXITS[-1:])]
for step in steps:
    step.run()
seconds = [
    [step.run()[1] for step in steps]
    for _ in track(range(count), "steps", console=screen(stderr=True))
]
medians = [statistics.median(column) for column in zip(*seconds, strict=True)]
table = Table("exits", "s a step", "GFLOP", "GFLOP/s", "of the peak", "peak memory, GB")
peak = matmul_peak("float32")
for step, median in zip(steps, medians, strict=True):
    rate = step.operations / median
    table.add_row(
        *(" ".join(map(str, step.exits)), f"{median:.3f}", f"{step.operations / 1e9:.0f}"),
        *(f"{rate / 1e9:.1f}", f"{rate / peak:.0%}", f"{step.peak_bytes / 1e9:.2f}"),
    )
screen().print(table)
measured = statistics.median(soft / sft for soft, sft in seconds)
computed = steps[0].operations / steps[1].operations
screen().print(
    f"three exits cost {measured:.3f} of one (median of {count} pairs); operations {computed:.3f}; "
    f"off by {measured / computed - 1:+.1%}"
)
