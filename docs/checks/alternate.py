"""Runs two programs as whole processes in alternation and prints the ratio of their median rates.

Usage: alternate.py ROUNDS "COMMAND A" "COMMAND B"   (each prints its rate on its last line: tokens/s, rounds/s)
"""

import shlex
import statistics
import subprocess
import sys

rounds, commands = int(sys.argv[1]), [shlex.split(command) for command in sys.argv[2:4]]
figures: list[list[float]] = [[], []]
for _ in range(rounds):
    for command, column in zip(commands, figures, strict=True):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        column.append(float(done.stdout.split()[-1]))
        print(f"{column[-1]:8.2f} /s  {shlex.join(command)}", flush=True)
a, b = (statistics.median(column) for column in figures)
print(f"medians {a:.2f} and {b:.2f} /s: ratio {a / b:.2f}")
