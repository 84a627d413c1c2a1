"""Where the tests' time goes: a pytest plugin that writes a line per test, and the table made of those lines.

    .venv/bin/python docs/checks/suite_profile.py DIR             runs `make test`'s tests, then prints the table
    .venv/bin/python docs/checks/suite_profile.py DIR --tables    prints the table of an earlier run
    .venv/bin/python docs/checks/suite_profile.py DIR -- -k tree  further arguments go to pytest

Seconds of compilation are those that JAX reports (`jax.monitoring`); a process that the test waits for counts as "processes",
whatever it does; "fixtures" is what a test's fixtures took apart from their compilation; the rest is tracing and computing.
Compilation in several threads at once may exceed the clock.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import subprocess
import sys
import time
from pathlib import Path

_DIRECTORY = "S2D_SUITE_PROFILE"
_EVENTS = {
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
}


class _Recorder:
    """Adds up what one worker's test does, and writes it when the test ends."""

    def __init__(self, path: Path):
        self.file = open(path, "w")  # noqa: SIM115 (open until the session ends)
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self.phase = {}
        self.waiting = False

    def write(self, **values) -> None:
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()

    def listen(self, event: str, duration: float, **_) -> None:
        if kind := _EVENTS.get(event):
            self.seconds[kind] += duration
            self.seconds["programs"] += kind == "compile"

    def timed(self, function):
        def wrapped(*args, **kwargs):
            if self.waiting:
                return function(*args, **kwargs)
            self.waiting, begun = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.waiting = False
                self.seconds["processes"] += time.perf_counter() - begun

        return wrapped


_RECORDER: _Recorder | None = None


def _listen_always(monitoring, recorder: _Recorder) -> None:
    """Listens on, also after a test that has cleared all listeners."""
    clear = monitoring.clear_event_listeners

    def cleared():
        clear()
        monitoring.register_event_duration_secs_listener(recorder.listen)

    monitoring.clear_event_listeners = cleared
    monitoring.register_event_duration_secs_listener(recorder.listen)


def pytest_configure(config):
    global _RECORDER
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        import jax

        worker = getattr(config, "workerinput", {}).get("workerid", "main")
        _RECORDER = _Recorder(Path(os.environ[_DIRECTORY]) / f"{worker}.jsonl")
        _listen_always(jax.monitoring, _RECORDER)
        for name in ("wait", "communicate"):
            setattr(subprocess.Popen, name, _RECORDER.timed(getattr(subprocess.Popen, name)))


def pytest_runtest_logreport(report):
    if _RECORDER is None:
        return
    r = _RECORDER
    r.phase[report.when] = report.duration
    if report.when == "setup":
        r.seconds["setup_compile"] = (
            r.seconds["compile"] + r.seconds["lower"] + r.seconds["processes"]
        )
    if report.when == "teardown":
        r.write(test=report.nodeid, **r.phase, **r.seconds)
        r.seconds.clear()
        r.phase.clear()


def pytest_collectreport(report):
    # Importing a test file is collecting it.
    if _RECORDER is not None and report.nodeid.endswith(".py") and hasattr(report, "duration"):
        _RECORDER.write(file=report.nodeid, imports=report.duration)


def pytest_sessionfinish(session):
    if _RECORDER is not None:
        _RECORDER.file.close()


def _rows(directory: Path) -> dict[str, dict[str, float]]:
    files: dict[str, dict[str, float]] = collections.defaultdict(
        lambda: collections.defaultdict(float)
    )
    for path in sorted(directory.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            record = collections.defaultdict(float, json.loads(line))
            if "test" not in record:
                continue
            row = files[record["test"].split("::")[0].removeprefix("tests/")]
            row["tests"] += 1
            row["programs"] += record["programs"]
            total = record["setup"] + record["call"] + record["teardown"]
            fixtures = max(record["setup"] + record["teardown"] - record["setup_compile"], 0.0)
            row["total"] += total
            row["fixtures"] += fixtures
            for kind in ("compile", "lower", "processes"):
                row[kind] += record[kind]
            spent = fixtures + record["compile"] + record["lower"] + record["processes"]
            row["rest"] += max(total - spent, 0.0)
    return files


def tables(directory: Path) -> str:
    files = _rows(directory)
    columns = ("tests", "total", "programs", "compile", "lower", "processes", "fixtures", "rest")
    whole = {c: sum(row[c] for row in files.values()) for c in columns}
    lines = ["| file | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    ordered = sorted(files.items(), key=lambda item: -item[1]["total"])
    for name, row in [("**all**", whole), *ordered]:
        lines.append(f"| {name} | " + " | ".join(f"{row[c]:.0f}" for c in columns) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("directory", type=Path, help="where the lines are written")
    parser.add_argument(
        "--tables", action="store_true", help="only print the table of an earlier run"
    )
    parser.add_argument("pytest", nargs="*", help="further arguments of pytest, after --")
    args = parser.parse_args()
    status = 0
    if not args.tables:
        args.directory.mkdir(parents=True, exist_ok=True)
        here = str(Path(__file__).parent.resolve())
        environment = {
            **os.environ,
            _DIRECTORY: str(args.directory.resolve()),
            "PYTHONPATH": os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH")))),
        }
        command = [sys.executable, "-m", "pytest", "-p", "suite_profile"]
        command += ["--numprocesses", "2", "--dist", "loadgroup", *args.pytest]
        status = subprocess.call(command, env=environment)
    print(tables(args.directory))
    return status


if __name__ == "__main__":
    sys.exit(main())
