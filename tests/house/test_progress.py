"""What is told while somebody waits: lines, a terminal, a notebook, and what is remembered of earlier times."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
import types

import pytest
from rich.console import Console
from rich.progress import TextColumn

from s2d_jax.cli.screen import CountingBar, SharedProgress
from s2d_jax.errors import UserError
from s2d_jax.progress import activity as module
from s2d_jax.progress import durations
from s2d_jax.progress.activity import activity, show_progress, text_is_written
from s2d_jax.progress.displays import Lines, Notebook, Terminal
from s2d_jax.progress.state import Activity, Board


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _nothing_chosen(monkeypatch):
    """Commands that other tests called have chosen lines."""
    monkeypatch.setattr(module, "_CHOSEN", module._Chosen())


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Durations of this test only."""
    monkeypatch.setenv("S2D_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "durations.json"


@pytest.fixture
def told(monkeypatch):
    """Lines that are told, in a process that asks for them; the clock is fake and stands."""
    lines: list[str] = []
    monkeypatch.delenv("S2D_PROGRESS")
    monkeypatch.setattr(module, "_CHOSEN", module._Chosen("lines"))
    monkeypatch.setattr(module, "_LINES", Lines(lines.append))
    return lines


@pytest.fixture
def screen(monkeypatch):
    """A terminal of 80 columns, on which activities are shown."""
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=80, color_system=None)
    monkeypatch.delenv("S2D_PROGRESS")
    monkeypatch.setattr(module, "in_terminal", lambda: True)
    monkeypatch.setattr(module, "Terminal", lambda: Terminal(console))
    return console


def told_of(*activities: Activity, seconds: int = 30) -> list[tuple[int, str]]:
    """The lines of a log, with the second of each."""
    now, lines = 0, []
    display = Lines(lambda line: lines.append((now, line)))
    for now in range(seconds):
        display.tick(activities, now)
    return lines


def no_thread() -> bool:
    return not any(thread.name == "s2d progress" for thread in threading.enumerate())


def test_a_long_activity_is_announced_and_told_every_ten_seconds():
    lines = told_of(Activity("compiling the decoding loop", expected=9.0))
    assert lines == [
        (0, "compiling the decoding loop, about 9 s"),
        (10, "compiling the decoding loop: 10 s, usually 9 s"),
        (20, "compiling the decoding loop: 20 s, usually 9 s"),
    ]


def test_a_first_time_is_a_guess_and_an_unknown_one_has_no_number():
    guess = Activity("compiling", expected=14.0, first_time=True)
    assert told_of(guess, seconds=12) == [
        (0, "compiling (first time; usually about 14 s)"),
        (10, "compiling: 10 s, first time, usually about 14 s"),
    ]
    assert told_of(Activity("reading"), seconds=13) == [(2, "reading"), (12, "reading: 12 s")]


def test_what_is_quick_or_comes_again_and_again_is_not_told():
    assert told_of(Activity("reading", expected=1.5), seconds=2) == []
    now, lines = 0, []
    display = Lines(lines.append)
    for now in range(9):
        display.tick([Activity("reading 900 tokens", expected=3.0, started=now)], now)
    assert lines == ["reading 900 tokens, about 3 s"]


def test_amounts_give_the_time_left():
    loading = Activity("loading m.gguf", total=4e9, unit="B", expected=8.0)
    assert loading.announced() == "loading m.gguf, about 8 s"
    loading.advance(1e9)
    assert loading.status(5.0) == "1.0 of 4.0 GB, 5 s, about 15 s left"
    assert (
        Activity("x", total=4e6, unit="B", done=4e6).status(1.0) == "4 of 4 MB, 1 s, about 1 s left"
    )
    assert Activity("x", expected=600.0).status(100.0) == "2 min, about 8 min left"


def test_quick_activities_do_not_flicker():
    delays = {
        expected: Activity("x", expected=expected).visible_after()
        for expected in (None, 0.5, 1.5, 9.0)
    }
    assert delays == {None: 0.3, 0.5: 1.0, 1.5: 0.3, 9.0: 0.0}


def test_a_terminal_shows_one_bar_for_each_and_wipes_them_away():
    shown, clock = io.StringIO(), Clock()
    console = Console(file=shown, force_terminal=True, width=80, color_system=None)
    board = Board(clock)
    loading = Activity("loading SmolLM2-135M-Instruct.Q4_1.gguf", total=4e9, unit="B")
    reading = Activity("reading the tokenizer", expected=4.0)
    board.begin(loading, Terminal(console))
    assert shown.getvalue() == ""  # it may be quick
    board.begin(reading, Terminal(console))
    first = shown.getvalue()
    assert "reading the tokenizer" in first
    assert "about 4 s left" in first
    assert "loading" not in first
    clock.now = 1.2
    loading.advance(1e9)
    board.tick()
    last = shown.getvalue().removeprefix(first)
    assert "loading SmolLM2" in last
    assert "1.0 of 4.0 GB, 1 s, about 4 s left" in last
    assert "1 s, about 3 s left" in last
    board.end(reading)
    board.end(loading)
    assert shown.getvalue().endswith("\x1b[1A\x1b[2K")  # the line is empty again
    assert shown.getvalue().count("\x1b[?25l") == shown.getvalue().count("\x1b[?25h")  # the cursor
    assert no_thread()


def test_an_exception_leaves_the_terminal_clean(screen):
    with pytest.raises(ZeroDivisionError), activity("compiling", expected=5.0):
        1 / 0  # noqa: B018
    assert "compiling" in screen.file.getvalue()
    assert screen.file.getvalue().endswith("\x1b[1A\x1b[2K")
    assert module.BOARD._going == []
    assert no_thread()


def test_no_bar_is_drawn_over_text_that_is_being_written(screen):
    with text_is_written(), activity("compiling", expected=5.0):
        pass
    assert screen.file.getvalue() == ""


def test_a_bar_of_a_command_shows_activities_below_its_own_tasks(screen):
    with activity("loading", expected=5.0):  # shown by itself before the bar begins, and after it
        with SharedProgress(TextColumn("{task.fields[speed]}"), console=screen) as bar:
            bar.add_task("answering", speed="12 tok/s")
            before = len(screen.file.getvalue())
            with activity("compiling the decoding loop", expected=5.0):
                bar.refresh()
            assert "12 tok/s" in screen.file.getvalue()[before:]
            assert "compiling the decoding loop" in screen.file.getvalue()[before:]
        assert "12 tok/s\nloading" not in screen.file.getvalue()[-40:]
        before = len(screen.file.getvalue())
        module.BOARD.tick()
        assert "loading" in screen.file.getvalue()[before:]
    assert no_thread()


def test_a_bar_without_a_terminal_tells_that_it_begins(told):
    shown = io.StringIO()
    with CountingBar(console=Console(file=shown, width=80)) as bar:
        bar.add_task("answering", total=3)
    assert shown.getvalue().splitlines()[0] == "answering 0 of 3"


def test_a_notebook_gets_a_line_that_is_updated(monkeypatch):
    shown = []

    class ZMQInteractiveShell:
        pass

    class Handle:
        def update(self, data, raw):
            shown.append(data["text/plain"])

    def display(data, raw, display_id):
        shown.append(data["text/plain"])
        return Handle()

    ipython = types.ModuleType("IPython")
    ipython.get_ipython = ZMQInteractiveShell
    inside = types.ModuleType("IPython.display")
    inside.display = display
    monkeypatch.delenv("S2D_PROGRESS")
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", inside)
    assert isinstance(module._display(), Notebook)
    with activity("compiling", expected=5.0):
        pass
    assert shown == ["compiling: 0 s, about 5 s left", ""]
    ipython.get_ipython = lambda: None  # IPython is imported, but this is no notebook
    assert module._display() is None


def test_who_sees_what(monkeypatch, capsys):
    monkeypatch.setattr(module, "_CHOSEN", module._Chosen())
    monkeypatch.delenv("S2D_PROGRESS")
    assert module._display() is None  # a script without a terminal
    module.show_lines_without_terminal()  # a command without one
    with activity("compiling", expected=5.0):
        pass
    assert capsys.readouterr().err == "compiling, about 5 s\n"
    show_progress("off")
    with activity("compiling", expected=5.0):
        pass
    monkeypatch.setenv("S2D_PROGRESS", "lines")  # overrides
    with activity("reading", expected=5.0):
        pass
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "reading, about 5 s\n")
    monkeypatch.setenv("S2D_PROGRESS", "loud")
    wrong = "S2D_PROGRESS='loud' is not a way to show progress; choose auto, lines or off"
    with pytest.raises(UserError, match=wrong), activity("compiling"):
        pass


def test_only_the_first_of_several_processes_shows(monkeypatch):
    import jax

    monkeypatch.setenv("S2D_PROGRESS", "lines")
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    for number in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda: number)  # noqa: B023
        assert module.is_shown() == (number == 0)


def test_a_screen_that_is_gone_stops_nothing(told, monkeypatch):
    def gone(line):
        raise BrokenPipeError

    monkeypatch.setattr(module, "_LINES", Lines(gone))
    with activity("compiling", expected=5.0) as it:
        it.advance()
    assert no_thread()


def test_durations_are_remembered(kept, told, monkeypatch):
    monkeypatch.setattr(module, "_SHORTEST_REMEMBERED", 0.0)
    durations.remember("compile/cpu/run/40/aa", 8.0)
    durations.remember("compile/cpu/run/40/aa", 4.0)
    durations.remember("load/gguf/f32", 2e6)
    assert durations.known("compile/cpu/run/40/aa") == 6.0  # between both
    assert durations.known("compile/cpu/extend/40/aa") is None
    with activity("compiling", key="compile/cpu/run/40/aa"):
        pass
    with activity("loading", key="load/gguf/f32", total=2e7, unit="B"):
        pass
    assert told == ["compiling, about 6 s", "loading, about 10 s"]
    assert durations.known("compile/cpu/run/40/aa") < 6.0  # it was quick this time
    with pytest.raises(ZeroDivisionError), activity("compiling", key="never"):
        1 / 0  # noqa: B018
    assert durations.known("never") is None


def test_a_program_that_is_new_takes_what_others_took_for_each_array(kept):
    for key, seconds in (("10/a", 1.0), ("20/b", 4.0), ("40/c", 12.0), ("40/c/kept", 0.1)):
        durations.remember(f"compile/cpu/run/{key}", seconds)
    assert durations.known_per_part("compile/cpu/run") == 0.2
    assert durations.known_per_part("compile/cpu/grow") is None


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"a": "x", "b": -1, "c": true, "d": null, "e": Infinity}', "\0"]
)
def test_a_damaged_file_is_no_error(kept, text):
    kept.parent.mkdir()
    kept.write_text(text)
    assert [durations.known(key) for key in "abcde"] == [None] * 5
    durations.remember("a", 2.0)
    assert durations.known("a") == 2.0


def test_a_file_that_cannot_be_written_is_no_error(kept, told, tmp_path):
    (tmp_path / "cache").write_text("a file where the directory should be")
    durations.remember("a", 2.0)
    with activity("compiling", key="a"):
        pass
    assert durations.known("a") is None


def test_the_file_stays_small(kept):
    for number in range(durations.MOST_REMEMBERED):
        durations.remember(f"old {number}", 1.0)
    durations.remember("old 0", 1.0)
    durations.remember("new", 1.0)
    names = list(json.loads(kept.read_text()))
    assert len(names) == durations.MOST_REMEMBERED
    assert names[-2:] == ["old 0", "new"]
    assert "old 1" not in names
    assert kept.stat().st_size < 20_000


def test_a_child_of_a_fork_shows_anew():
    code = (
        "import os; from s2d_jax.progress.activity import BOARD, activity\n"
        "with activity('a', expected=5.0):\n"
        "    BOARD._lock.acquire()\n"
        "    if os.fork() == 0:\n"
        "        with activity('b', expected=5.0): os._exit(BOARD._going[0].text != 'b')\n"
        "    raise SystemExit(os.waitstatus_to_exitcode(os.wait()[1]))\n"
    )
    environment = {"S2D_PROGRESS": "lines", "PATH": ""}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, timeout=60)
    assert done.returncode == 0
