"""A newcomer's first fifteen minutes, typed by a script: what each step says, and how long it is silent.

    python docs/checks/first_minutes.py --work DIR [--keep-environment] [--out TRANSCRIPT.md]

Builds the wheel, installs it into an environment of its own, and from then on uses that only, in an empty folder: a first
answer, a stream, a conversation in Python, a benchmark, a training that is interrupted and resumed, an export. Every step runs
in a terminal of 100 columns; "silent" is the longest time in which nothing reached it, and "first" the time until something
did. It takes a quarter of an hour and needs only the package registry.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODEL = "models/SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERSATION = f"""
from s2d_jax import SpeculativeDecoder

decoder = SpeculativeDecoder("{MODEL}")
conversation = decoder.conversation()
for question in ("Why is the sky blue?", "And in the evening?"):
    print(conversation.ask(question).text)
"""
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclasses.dataclass(frozen=True)
class Step:
    """What is typed.

    Attributes:
        name: for the table.
        command: words.
        interrupt_after: seconds until Ctrl-C, once `interrupt_at` was shown; None lets it end.
        interrupt_at: a text.
    """

    name: str
    command: tuple[str, ...]
    interrupt_after: float | None = None
    interrupt_at: str = ""


@dataclasses.dataclass(frozen=True)
class Heard:
    """What a step said, and when it did not."""

    step: Step
    status: int
    seconds: float
    first: float
    silent: float
    silent_after: str
    text: str


def steps(wheel: Path) -> list[Step]:
    """All steps, in order."""
    train = ("s2d-train", "--config", "configs/smollm2_demo.yaml", "--data.paths", "answers.jsonl")
    train += (
        "--train.run-dir",
        "run",
        "--train.max-minutes",
        "2",
        "--train.checkpoint-every",
        "10",
    )
    train += (
        "--train.eval-every",
        "20",
    )
    ask = ("--target", MODEL, "--max-new-tokens", "48", "--prompt", "Why is the sky blue?")
    bench = ("--questions", "configs/demo_prompts_eval.jsonl", "--max-questions", "2")
    return [
        Step("install the wheel", ("pip", "install", f"{wheel}[gguf]")),
        Step("what is here", ("s2d-generate", "--version")),
        Step("the flags", ("s2d-generate", "--help")),
        Step("a model", ("s2d-demo-model", "models")),
        Step("a first answer", ("s2d-generate", *ask)),
        Step("a stream", ("s2d-generate", *ask, "--stream")),
        Step("a conversation in Python", ("python", "-c", CONVERSATION)),
        Step(
            "answers to train on",
            (
                "s2d-generate",
                "--target",
                MODEL,
                "--prompts",
                "configs/demo_prompts_eval.jsonl",
                "--out",
                "answers.jsonl",
                "--batch-size",
                "16",
                "--max-new-tokens",
                "64",
            ),
        ),
        Step("a training, interrupted", train, 2.0, "step 12 "),
        Step("resumed", (*train, "--train.resume")),
        Step("an export", ("s2d-export", "--run", "run", "--out", "draft")),
        Step(
            "a benchmark",
            (
                "s2d-bench",
                "--target",
                MODEL,
                "--draft",
                "draft",
                *bench,
                "--max-new-tokens",
                "32",
                "--methods",
                "ar,s2d",
                "--num-draft-tokens",
                "3",
                "--out",
                "bench",
            ),
        ),
    ]


def hear(step: Step, folder: Path, binaries: Path) -> Heard:
    """Runs a step in a terminal and listens."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        os.environ["PATH"] = f"{binaries}:{os.environ['PATH']}"
        os.environ["TERM"] = "xterm-256color"
        for name in ("PYTHONPATH", "JAX_COMPILATION_CACHE_DIR", "COLUMNS"):
            os.environ.pop(name, None)
        os.environ["S2D_CACHE_DIR"] = str(folder / "cache")
        time.sleep(0.2)  # until the terminal has its size
        os.execvp(step.command[0], step.command)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    start = last = time.monotonic()
    first, silent, after, text, due = 0.0, 0.0, "", "", None
    while True:
        ready, _, _ = select.select([terminal], [], [], 0.1)
        now = time.monotonic()
        if due is not None and now > due:
            os.kill(child, signal.SIGINT)
            due = None
        if not ready:
            continue
        try:
            data = os.read(terminal, 65536)
        except OSError:
            break
        if not data:
            break
        if now - last > silent:
            silent, after = now - last, text[-60:]
        first, last = first or now - start, now
        text += data.decode(errors="replace")
        waits = step.interrupt_after is not None and due is None
        if waits and first and step.interrupt_at in text and "^C" not in text:
            due, step = now + step.interrupt_after, dataclasses.replace(step, interrupt_after=None)
    seconds = time.monotonic() - start
    silent, after = max((silent, after), (time.monotonic() - last, text[-60:]))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Heard(step, status, seconds, first, silent, after, text)


def shown(text: str) -> str:
    """What stays on the screen, without colours: bars are drawn over their last state."""
    lines, row = [""], 0
    for part in re.split(r"(\r?\n|\r|\x1b\[\d*A|\x1b\[2K)", text):
        if part.endswith("\n"):
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part.endswith("A") and part.startswith("\x1b"):
            row = max(0, row - int(part[2:-1] or 1))
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part and part != "\r":
            lines[row] += _ANSI.sub("", part)
    return "\n".join(line.rstrip() for line in lines).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="an empty folder")
    parser.add_argument("--keep-environment", action="store_true", help="skip the installation")
    parser.add_argument("--out", type=Path, help="write the transcript here")
    args = parser.parse_args()
    work, folder = args.work.absolute(), args.work.absolute() / "user"
    folder.mkdir(parents=True, exist_ok=True)
    python = sys.executable
    if not args.keep_environment:
        wheels = [python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(work), str(ROOT)]
        subprocess.run(wheels, check=True)
        subprocess.run([python, "-m", "venv", str(work / "env")], check=True)
    wheel = next(work.glob("*.whl"))
    todo = steps(wheel)[1 if args.keep_environment else 0 :]
    lines = ["| step | status | seconds | first | silent |", "|---|---:|---:|---:|---:|"]
    print("\n".join(lines))
    parts = []
    for step in todo:
        heard = hear(step, folder, work / "env" / "bin")
        figures = f"{heard.seconds:.1f} | {heard.first:.1f} | {heard.silent:.1f}"
        lines.append(f"| {step.name} | {heard.status} | {figures} |")
        print(lines[-1], repr(heard.silent_after) if heard.silent > 2 else "", flush=True)
        parts.append(f"$ {' '.join(step.command)}\n{shown(heard.text)}")
    if args.out is not None:
        args.out.write_text("\n\n".join(["\n".join(lines), *parts]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
