"""A program that passes on what another writes to stderr. What JAX's C++ writes when process 0 is gone becomes one line.

Its argument is that line. It is started with every process but the first, so it imports nothing that takes time.
"""

import re
import sys

# The coordination service's client, and what runs beside it, begin with their level, date and file.
_BEGIN = re.compile(
    rb"[WEF]\d{4} [\d:.]+ +\d+ (coordination_service_agent|preemption_sync_manager|client)\."
)
_END = b"JAX distributed service detected fatal errors"


def main() -> None:
    out, held, said = sys.stdout.buffer, [], False
    for line in sys.stdin.buffer:
        if held or _BEGIN.match(line):
            held.append(line)
            continue
        said = said or line.startswith(b"error: ")
        out.write(line)
        out.flush()
    if any(_END in line for line in held):
        held = [] if said else [sys.argv[1].encode() + b"\n"]
    out.writelines(held)


if __name__ == "__main__":
    main()
