"""Runs the parts in turn, and writes what is known after each."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax

from infer.accelerator_check.args import Args
from infer.accelerator_check.memory import is_out_of_memory
from infer.accelerator_check.parts import PARTS, Part
from infer.accelerator_check.report import show_part, write_report
from infer.accelerator_check.subject import Subject, subject_of
from s2d_jax.backends import platform_of
from s2d_jax.cli.command import say_devices
from s2d_jax.cli.environment import environment
from s2d_jax.cli.loading import keep_programs
from s2d_jax.cli.outputs import check_directory
from s2d_jax.cli.screen import counting_bar, eta, screen
from s2d_jax.files import write_text

NO_ROOM = "did not fit into the device's memory; the other parts were measured without it"


def check(args: Args) -> None:
    """Measures all parts, prints a table of each, and writes accelerator_check.json, report.md and verify.png.

    Raises:
        UserError: where nothing can be written, or for a size, mesh or model that cannot be used.
    """
    check_directory(args.out)
    keep_programs(None)
    say_devices()
    subject = subject_of(args)
    report = _begun(args, subject)
    screen().print(f"measuring {subject.name}: {report['subject']['why']}")
    for part in PARTS:
        report["parts"][part.name] = _measured(part, subject, args.repeats)
        # After each part, so that nothing is lost if a later one is interrupted.
        write_text(args.out / "accelerator_check.json", json.dumps(report, indent=2) + "\n")
        write_report(args.out, report)
        show_part(screen(), report, part.name)
    screen().print(f"written: {args.out / 'report.md'}", soft_wrap=True)


def _begun(args: Args, subject: Subject) -> dict[str, Any]:
    config = subject.size.config
    why = "random weights, as --size says"
    if args.model is not None:
        why = "the model of --model, with a random draft"
    elif args.size is None:
        why = "random weights; the largest size that fits here"
        if platform_of(None) == "cpu":
            why = "random weights; a CPU gets the smallest size"
    devices = 1 if subject.mesh is None else subject.mesh.size
    return {
        "environment": environment("bfloat16"),
        "device_kind": jax.devices()[0].device_kind,
        "devices_used": devices,
        "subject": {"name": subject.name, "why": why, "exits": subject.size.exits},
        "shapes": dataclasses.asdict(config),
        "repeats": args.repeats,
        "seed": args.seed,
        "parts": {},
    }


def _measured(part: Part, subject: Subject, repeats: int) -> dict[str, Any]:
    """The figures of a part; `{"failed": reason}` where the device has too little memory."""
    with counting_bar(*eta()) as bar:
        task = bar.add_task(part.title, total=part.ticks(subject, repeats))
        try:
            return part.measure(
                subject, repeats, lambda name: bar.update(task, advance=1, description=name)
            )
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return {"failed": NO_ROOM}
