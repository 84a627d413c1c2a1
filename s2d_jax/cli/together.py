"""A command that several processes do together: what ends one of them ends all, and each says why on one line.

One that fails tells the others through JAX's coordination service, which process 0 runs. One that is killed, or whose machine
is lost, tells nothing; so each gives a sign of life there, and process 0 looks who is silent.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from s2d_jax.cli import last_words
from s2d_jax.cli.agreement import check_flags_agree
from s2d_jax.cli.command import NOTHING_LEFT, Args, told
from s2d_jax.errors import UserError
from s2d_jax.processes import (
    SECONDS_TO_MEET,
    coordination,
    is_main_process,
    number_of_processes,
    process_number,
    start_processes,
    wait_for_all,
    where_to_meet,
)

_FAILURE, _SIGNS = "s2d/failure", "s2d/alive/"
_SECONDS_BETWEEN_LOOKS, _SECONDS_BETWEEN_SIGNS = 1.0, 5.0
_SECONDS_WITHOUT_A_WORD = 10.0
# JAX itself waits for 100 s, and ends with a stack of C++.
_LONGEST_SILENCE = 30.0
_ENDED = "ended"


def done_together(
    work: Callable[[], int | None],
    interrupted: Callable[[], str],
    remedy: str,
    *,
    preemption: bool = False,
) -> int:
    """Does the work of a command, together with the other processes that the environment names; returns its exit status.

    A mistake of the user's is one line on stderr and status 2. Where there are several processes, the failure of one ends all.

    Args:
        work: returns the exit status; None is 0.
        interrupted: what the line says after Ctrl-C.
        remedy: what to do when a process is lost, such as "start all again".
        preemption: as for `start_processes`.
    """

    def started() -> int:
        with _meeting():
            start_processes(preemption=preemption)
        return 0

    def watched() -> int:
        with _ending_together(remedy):
            status = work() or 0
            wait_for_all("end of the work")  # one that still writes may fail
            return status

    if status := _status_of(started, interrupted, remedy):
        return status
    with _short_last_words(None if is_main_process() else f"process 0 is gone; {remedy}"):
        return _status_of(watched, interrupted, remedy)


def do_together(work: Callable[[Args], None], args: Args) -> None:
    """`done_together` for a command with these flags that leaves nothing half-written; exits with every status but 0."""

    def agreed() -> None:
        check_flags_agree(type(args).__module__.removesuffix(".args"), args)
        work(args)

    remedy = "start all again with the same command"
    if status := done_together(agreed, lambda: NOTHING_LEFT, remedy):
        sys.exit(status)


def _status_of(work: Callable[[], int], interrupted: Callable[[], str], remedy: str) -> int:
    """What `work` returns; after a failure its line is printed and, of several processes, this one ends here."""
    try:
        return work()
    except (UserError, OSError, KeyboardInterrupt) as error:
        return _failed(*told(error, interrupted()))
    except Exception as error:
        if number_of_processes() == 1:
            raise
        # What fails between processes on CPUs, in Gloo, may come as another kind of error.
        if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):
            words = " ".join(str(error).split())[:160]
            lost = f"most often another process is gone: see what it said, then {remedy}"
            return _failed(1, f"error: {words}; {lost}")
        traceback.print_exc()
        return _failed(1, f"error: {type(error).__name__}, see the lines above")


def _failed(status: int, message: str) -> int:
    print(message, file=sys.stderr)
    _end_all(status, f"process {process_number()}: {message.removeprefix('error: ')}")
    return status


@contextlib.contextmanager
def _meeting() -> Iterator[None]:
    """Says whom this process waits for, and on one line that they did not come."""
    place = where_to_meet()
    if place is None:
        yield
        return
    line = (
        f"the processes of this run did not find each other at {place}; start all within {SECONDS_TO_MEET} s, where it can be "
        "reached, with one number of processes and each with its own id"
    )
    notice = threading.Timer(
        _SECONDS_WITHOUT_A_WORD,
        lambda: print(f"waiting for the other processes at {place}", file=sys.stderr, flush=True),
    )
    notice.daemon = True
    with _short_last_words(line):
        notice.start()
        try:
            yield
        finally:
            notice.cancel()


@contextlib.contextmanager
def _ending_together(remedy: str) -> Iterator[None]:
    """A failure elsewhere ends this process, too, which might otherwise wait for the failed one."""
    if number_of_processes() == 1:
        yield
        return
    watch = _Watch(remedy)
    watch.start()
    try:
        yield
    finally:
        watch.stop()


class _Watch:
    """Gives signs of life, and ends this process once another has failed or is silent."""

    def __init__(self, remedy: str):
        self._client, self._me = coordination(), process_number()
        self._remedy, self._over = remedy, threading.Event()
        self._answered = time.monotonic()
        self._heard: dict[str, tuple[str, float]] = {}
        # Whoever asks process 0 may wait for an answer, so another thread counts the seconds.
        works = (self._look, self._mind_the_silence)
        self._threads = [threading.Thread(target=work, daemon=True) for work in works]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._over.set()
        self._threads[0].join(_SECONDS_BETWEEN_SIGNS)  # or its sign could come after the last one
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 is gone
            self._sign(_ENDED)

    def _look(self) -> None:
        signed = -_SECONDS_BETWEEN_SIGNS
        while not self._over.wait(_SECONDS_BETWEEN_LOOKS):
            now, failure = time.monotonic(), None
            try:
                if now - signed >= _SECONDS_BETWEEN_SIGNS:
                    self._sign(str(now))
                    signed = now
                    if is_main_process():
                        self._listen(now)
                failure = self._client.key_value_try_get(_FAILURE)
            except jax.errors.JaxRuntimeError as error:
                if "NOT_FOUND" not in str(error):  # process 0 is gone; else nobody failed
                    continue
            self._answered = time.monotonic()
            if failure is not None:
                self._end_with(failure)

    def _sign(self, text: str) -> None:
        self._client.key_value_set(f"{_SIGNS}{self._me}", text, allow_overwrite=True)

    def _listen(self, now: float) -> None:
        """Ends all if a process has given no new sign for long."""
        found = self._client.key_value_dir_get(_SIGNS)
        signs = {name.rpartition("/")[2]: sign for name, sign in found}
        for number in map(str, range(number_of_processes())):
            sign = signs.get(number, "")  # none yet
            last, since = self._heard.get(number, ("", now))
            if sign != last:
                since = now
            self._heard[number] = sign, since
            silent = sign != _ENDED and now - since > _LONGEST_SILENCE
            if silent and not self._over.is_set():
                message = f"process {number} gives no sign of life for {now - since:.0f} s; {self._remedy}"
                print(f"error: {message}", file=sys.stderr, flush=True)
                _end_all(1, message)

    def _end_with(self, failure: str) -> None:
        """Ends as the process did that failed first."""
        if self._over.is_set():
            return
        status, _, message = failure.partition(" ")
        print(f"error: {message}", file=sys.stderr, flush=True)
        if is_main_process():
            time.sleep(2 * _SECONDS_BETWEEN_LOOKS)  # the others read the message from this process
        os._exit(int(status))

    def _mind_the_silence(self) -> None:
        while not self._over.wait(_SECONDS_BETWEEN_LOOKS):
            silence = time.monotonic() - self._answered
            if silence > _LONGEST_SILENCE:
                line = f"process 0 gives no sign of life for {silence:.0f} s; {self._remedy}"
                print(f"error: {line}", file=sys.stderr, flush=True)
                os._exit(1)


def _end_all(status: int, message: str) -> None:
    """Tells the other processes of the run, if there are any, and ends this one without waiting for them."""
    client = coordination()
    if client is None:
        return
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first, or process 0 is gone
        client.key_value_set(_FAILURE, f"{status} {message}")
    sys.stdout.flush()
    sys.stderr.flush()
    if is_main_process():
        time.sleep(2 * _SECONDS_BETWEEN_LOOKS)  # the others read the message from this process
    os._exit(status)


@contextlib.contextmanager
def _short_last_words(line: str | None) -> Iterator[None]:
    """Where JAX's C++ ends this process, it writes some thirty lines; a reader makes them this one, None for no reader."""
    if line is None:
        yield
        return
    reader, writer = os.pipe()
    own = os.dup(2)
    program = [sys.executable, "-I", str(Path(last_words.__file__)), f"error: {line}"]
    child = subprocess.Popen(program, stdin=reader, stdout=own, start_new_session=True)
    sys.stderr.flush()
    os.dup2(writer, 2)
    os.close(reader)
    os.close(writer)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(own, 2)
        os.close(own)
        # What the work has started may hold the pipe open.
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=2)
