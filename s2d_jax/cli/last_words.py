"""A program that passes on what another writes to stderr. What JAX's C++ writes when it ends a process becomes one line.

Its argument is that line. It is started beside processes that work together, so it imports nothing that takes time.
"""

import re
import signal
import sys

# The coordination service's client, and what runs beside it, begin with their level, date and file.
_BEGIN = re.compile(
    rb"[WEF]\d{4} [\d:.]+ +\d+ (coordination_service_agent|preemption_sync_manager|client)\."
)
_END = b"JAX distributed service detected fatal errors"


def main() -> None:
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # it ends with what it reads from
        signal.signal(each, signal.SIG_IGN)
    out, held, said = sys.stdout.buffer, [], False
    for line in sys.stdin.buffer:
        if _END in line:  # in a container, little time is left now
            if not said:
                out.write(sys.argv[1].encode() + b"\n")
                out.flush()
            return
        if held or _BEGIN.match(line):
            held.append(line)
            continue
        said = said or line.startswith(b"error: ")
        out.write(line)
        out.flush()
    out.writelines(held)


if __name__ == "__main__":
    main()
