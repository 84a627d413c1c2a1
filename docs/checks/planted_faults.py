"""What the tests notice: plants faults in a copy of the source, one after another, and shows which test fails.

    .venv/bin/python docs/checks/planted_faults.py --baseline    first: every selection of tests passes as the source stands
    .venv/bin/python docs/checks/planted_faults.py               plants all faults of faults/; --list tells them
    .venv/bin/python docs/checks/planted_faults.py NAME ...      plants these; --baseline takes names as well

The working tree (what git tracks, and what it does not ignore) is copied to a temporary directory. There each fault is put in,
its tests run until the first one fails, and the file is put back. A fault is caught by a test that ran and failed: not by an
error while tests are collected or fixtures made, not by a program that merely crashed, nor by one that did not end.

Exit status: 0 if all are caught (or pass, with --baseline), 1 if not, 2 if a fault does not fit the source any more.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from faults import FAULTS, Fault
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("s2d_jax", "train", "infer")
# What a change that does not run at all raises; a wrong rule runs.
_CRASHES = ("AttributeError", "ImportError", "ModuleNotFoundError", "NameError", "SyntaxError")
_CRASHES += ("TypeError", "UnboundLocalError")
_FAILED = re.compile(r"^FAILED tests/(\S+?::.+?)(?: - (.*))?$", re.MULTILINE)


def pytest_configure() -> None:
    """As a plugin of the tests: a failing example is told at once, without minutes spent on a smaller one."""
    from hypothesis import Phase, settings

    settings.register_profile("planted", phases=(Phase.explicit, Phase.generate))
    settings.load_profile("planted")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a selection of tests said.

    Attributes:
        caught: a test ran and failed.
        words: which one, or what came instead.
        seconds: on the clock.
    """

    caught: bool
    words: str
    seconds: float


class Copy:
    """A copy of the working tree that tests run in."""

    def __init__(self, directory: Path, longest: float):
        self.directory, self._longest = directory, longest
        for name in _files_of_the_tree():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, directory / name)
        # The modules of this tree come before an editable installation of another one.
        path = os.pathsep.join([str(directory), str(directory / "docs" / "checks")])
        self._environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "500"}
        self._check_imports()

    def _check_imports(self) -> None:
        program = "import importlib.util as u; print(*(u.find_spec(n).origin for n in {!r}))"
        command = [sys.executable, "-c", program.format(_PACKAGES)]
        done = subprocess.run(
            command, env=self._environment, cwd="/", capture_output=True, text=True, check=True
        )
        for name, found in zip(_PACKAGES, done.stdout.split(), strict=True):
            if Path(found) != self.directory / name / "__init__.py":
                sys.exit(f"error: {name} would be imported from {found}, not from the copy")

    @contextlib.contextmanager
    def planted(self, fault: Fault) -> Iterator[None]:
        """With the fault in its file, which is then put back, its time included: so Python compiles neither for the other."""
        file = self.directory / fault.file
        text, status = file.read_text(encoding="utf-8"), file.stat()
        try:
            file.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
            yield
        finally:
            file.write_text(text, encoding="utf-8")
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))

    def run(self, tests: str) -> Outcome:
        """Runs a selection until its first failure."""
        words = shlex.split(tests)
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        command += ["-p", "planted_faults", f"tests/{words[0]}", *words[1:]]
        started = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=self.directory,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            told, _ = process.communicate(timeout=self._longest)
        except subprocess.TimeoutExpired:
            return Outcome(False, f"no end after {self._longest:.0f} s", self._longest)
        finally:
            if process.poll() is None:  # tests start processes of their own
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        return _outcome(process.returncode, told, time.perf_counter() - started)


def _files_of_the_tree() -> list[str]:
    """What git tracks and has not lost, and what it does not ignore."""
    listed = []
    for more in ((), ("--others", "--exclude-standard")):
        done = subprocess.run(
            ["git", "ls-files", "-z", *more], cwd=ROOT, capture_output=True, text=True, check=True
        )
        listed += done.stdout.split("\0")
    return [name for name in listed if name and (ROOT / name).is_file()]


def _outcome(status: int, told: str, seconds: float) -> Outcome:
    """From pytest's exit status and output."""
    last = (told.strip().splitlines() or ["nothing was said"])[-1].strip("= ")
    if status == 1 and (found := _FAILED.search(told)):
        test, reason = found[1], found[2] or ""
        if reason.startswith(_CRASHES):
            return Outcome(False, f"{test} only crashes: {reason[:100]}", seconds)
        return Outcome(True, test, seconds)
    if status == 0:
        passes = " passed" in told
        return Outcome(False, "all pass" if passes else f"none ran: {last}", seconds)
    kinds = {1: "an error in a fixture", 2: "an error while collecting", 5: "no tests"}
    return Outcome(False, f"{kinds.get(status, f'pytest ended with {status}')}: {last}", seconds)


def _stale(fault: Fault) -> str | None:
    """Why a fault does not fit the source any more."""
    file = ROOT / fault.file
    count = file.read_text(encoding="utf-8").count(fault.old) if file.is_file() else 0
    if count != 1:
        return f"{fault.name} is stale: its text stands {count} times in {fault.file}"
    if not (ROOT / "tests" / shlex.split(fault.tests)[0]).is_file():
        return f"{fault.name} is stale: there is no tests/{shlex.split(fault.tests)[0]}"
    return None


class Rows:
    """A table whose rows appear as they come."""

    def __init__(self, *columns: tuple[str, int]):
        self._console, self._columns = Console(highlight=False, width=120), columns
        self.add(*(f"[bold]{name}[/]" for name, _ in columns))

    def add(self, *cells: str) -> None:
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, width in self._columns:
            justify = "right" if name == "seconds" else "left"
            table.add_column(width=width, overflow="fold", justify=justify)
        table.add_row(*cells)
        self._console.print(table)
        self._console.file.flush()


def _shown(text: str) -> str:
    return text.replace("[", r"\[")  # no markup of rich's


def baseline(copy: Copy, faults: list[Fault]) -> int:
    """Runs each selection once as the source stands; how many do not pass."""
    rows, bad = Rows(("tests", 70), ("as the source stands", 32), ("seconds", 8)), 0
    for tests in dict.fromkeys(fault.tests for fault in faults):
        outcome = copy.run(tests)
        passes = outcome.words == "all pass"
        bad += not passes
        words = "pass" if passes else f"[bold red]{_shown(outcome.words)}[/]"
        rows.add(_shown(tests), words, f"{outcome.seconds:.0f}")
    return bad


def plant(copy: Copy, faults: list[Fault]) -> int:
    """Plants one fault after another; how many nobody notices."""
    rows, survivors = Rows(("fault", 46), ("caught by", 58), ("seconds", 8)), []
    for fault in faults:
        with copy.planted(fault):
            outcome = copy.run(fault.tests)
        words = _shown(outcome.words)
        if not outcome.caught:
            survivors.append(fault.name)
            words = f"[bold red]NOT CAUGHT[/] {_shown(fault.tests)}: {words}"
        name = f"[bold]{fault.name}[/]\n{_shown(fault.what)}"
        rows.add(name, words, f"{outcome.seconds:.0f}")
    print(f"{len(faults) - len(survivors)} of {len(faults)} faults are caught", flush=True)
    if survivors:
        print(f"not caught: {' '.join(survivors)}", flush=True)
    return len(survivors)


def listing(faults: list[Fault]) -> None:
    rows = Rows(("fault", 46), ("file", 30), ("tests that must notice", 38))
    for fault in faults:
        rows.add(f"[bold]{fault.name}[/]\n{_shown(fault.what)}", fault.file, _shown(fault.tests))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults; without any, all")
    parser.add_argument("--list", action="store_true", help="tell the faults, and plant none")
    parser.add_argument(
        "--baseline", action="store_true", help="run each selection once without a fault"
    )
    parser.add_argument(
        "--longest", type=float, default=1200.0, help="seconds that one selection may take"
    )
    args = parser.parse_args()
    known = {fault.name: fault for fault in FAULTS}
    if unknown := [name for name in args.names if name not in known]:
        parser.error(f"no fault is called {', '.join(unknown)}; --list tells their names")
    faults = [known[name] for name in args.names] or FAULTS
    stale = [words for fault in faults if (words := _stale(fault))]
    for words in stale:
        print(f"error: {words}", file=sys.stderr)
    if args.list:
        listing(faults)
    if stale or args.list:
        return 2 if stale else 0
    with tempfile.TemporaryDirectory(prefix="planted-faults-") as directory:
        copy = Copy(Path(directory).resolve(), args.longest)
        return min(1, (baseline if args.baseline else plant)(copy, faults))


if __name__ == "__main__":
    sys.exit(main())
