"""The report of a check: tables on the screen, and a page with a plot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from s2d_jax.cli.figures import COLOURS, MARKED, log_ticks, save_figure
from s2d_jax.cli.tables import print_table
from s2d_jax.files import write_text

Report = dict[str, Any]
# Title, headings, rows of cells.
TableOf = tuple[str, list[str], list[list[str]]]

_NOTES = {
    "limits": "The limits that figures below are held against, of all devices in use together.",
    "verify": "Milliseconds of a round of plain decoding whose target pass has so many positions, inside one loop on "
    "the device. The ratio is to width 1: it is near 1 as long as reading the weights takes longer than computing with "
    "them. Plain decoding must read all matrices of the layers and the head, and the keys and values of the text, for "
    "each token.",
    "rounds": "Milliseconds of a round by the exit that drafts. Draft, verify and rest (acceptance, rewinds, and the "
    "host that asks whether to go on) are programs of their own that the host waits for; a step is the drafting of one "
    "token, with its share of what the draft catches up. In one loop, no host waits: the difference to the sum of the "
    "parts is what that saves. **Acceptance is simulated**, as below.",
    "prefill": "A prompt in one row. Operations: 2 N per token for the matrices of the layers, attention of every "
    "position to those before it, and the head once.",
    "simulated": "**Acceptance is simulated**: coins accept each drafted token with the probability in the first column, "
    "and the text means nothing. Draft, target pass and argmax are computed as in greedy decoding. Plain decoding is the "
    "same target without a draft. Expected is (1 - a^(G + 1)) / (1 - a); few rounds differ from it by chance. The "
    "acceptance of a real draft depends on its training and on the prompts: `infer.bench` measures it.",
    "training": "Sorted Fine-Tuning of the whole draft on random tokens: bf16 products, f32 weights. Model operations "
    "(MFU): 6 N + 3 A per token, where N counts the matrices of all layers and the head once per exit, and "
    "A = 4 L N_heads H (T + 1) / 2 is causal attention forward (PaLM, appendix B, with half of its attention). Layers that "
    "are computed again count once.",
}
_TITLES = {
    "limits": "Limits",
    "verify": "Verify passes and plain decoding",
    "rounds": "The parts of a round",
    "prefill": "Prefill",
    "simulated": "S2D at a simulated acceptance",
    "training": "Training the draft",
}


def show_part(console: Console, report: Report, name: str) -> None:
    """Prints the tables of a part, or the line that says why there are none."""
    figures = report["parts"][name]
    if "failed" in figures:
        console.print(f"{_TITLES[name]}: {figures['failed']}", soft_wrap=True)
        return
    for title, headings, rows in _TABLES[name](report):
        print_table(console, title, headings, rows)


def write_report(directory: Path, report: Report) -> None:
    """Writes report.md of the parts that are known, and verify.png once verify passes are."""
    verify = report["parts"].get("verify", {})
    if "rows" in verify:
        save_figure(verify_figure(verify["rows"]), directory / "verify.png")
    subject = report["subject"]
    exits = ", ".join(map(str, subject["exits"]))
    intro = (
        f"Measured on {report['devices_used']} x {report['device_kind']}: {subject['name']} ({subject['why']}) in bf16, "
        f"a draft with exits {exits}, one row. "
        f"Each figure is the median of {report['repeats']} runs, in turn with the others of its part."
    )
    pieces = ["# What this accelerator reaches", intro]
    for name, figures in report["parts"].items():
        pieces += [f"## {_TITLES[name]}", _NOTES[name]]
        if "failed" in figures:
            pieces.append(f"This part {figures['failed']}.")
            continue
        pieces += [_markdown(table) for table in _TABLES[name](report)]
        if name == "verify":
            pieces.append("![verify passes by width](verify.png)")
    listed = "\n".join(f"- {key}: {value}" for key, value in report["environment"].items())
    pieces.append(f"## Environment\n\n{listed}")
    write_text(directory / "report.md", "\n\n".join(pieces) + "\n")


def verify_figure(rows: list[Report]) -> Figure:
    """Milliseconds of a verify pass over its width, with what no cost for width would be."""
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    widths, taken = ([row[key] for row in rows] for key in ("width", "milliseconds"))
    axes.plot(widths, taken, color=COLOURS[0], marker="o", label="measured")
    axes.axhline(taken[0], color=MARKED, linestyle="--", label="as width 1")
    axes.set(xlabel="positions of a verify pass", ylabel="milliseconds", xscale="log")
    axes.set_ylim(bottom=0)
    log_ticks(axes.xaxis)
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def share_of_limit(report: Report, name: str, value: float) -> str:
    """A percentage of the devices' limit, or "no limit known"."""
    limits = report["parts"].get("limits", {})
    return f"{100 * value / limits[name]:.1f} %" if name in limits else "no limit known"


def _limits(report: Report) -> list[TableOf]:
    limits = report["parts"]["limits"]
    measured = limits["measured_on_one_device"]
    every = [(limits["source"], limits["devices"], limits)]
    if measured != {name: limits[name] for name in measured}:
        every.append(("measured: row sums, a square bf16 product", 1, measured))
    rows = [
        [source, str(devices), f"{one['bandwidth'] / 1e9:,.0f}", f"{one['flops'] / 1e12:,.2f}"]
        for source, devices, one in every
    ]
    return [("limits", ["source", "devices", "GB/s", "TFLOP/s"], rows)]


def _verify(report: Report) -> list[TableOf]:
    figures = report["parts"]["verify"]
    rows = [
        [str(row["width"]), f"{row['milliseconds']:.3f}", f"{row['ratio']:.2f}"]
        for row in figures["rows"]
    ]
    plain = figures["plain"]
    read = plain["bytes_per_second"]
    cells = [
        f"{plain['tokens_per_second']:,.1f}",
        f"{plain['bytes_per_token'] / 1e6:,.1f}",
        f"{read / 1e9:,.1f}",
        share_of_limit(report, "bandwidth", read),
    ]
    return [
        ("plain decoding", ["tokens/s", "MB per token", "GB/s", "of the limit"], [cells]),
        ("verify passes", ["positions", "ms", "ratio"], rows),
    ]


def _rounds(report: Report) -> list[TableOf]:
    keys = ("step", "draft", "verify", "rest", "in_one_loop")
    rows = [
        [str(row["exit"]), *(f"{row[key]:.3f}" for key in keys)]
        for row in report["parts"]["rounds"]["rows"]
    ]
    headings = ["exit", "ms a step", "draft", "verify", "rest", "in one loop"]
    return [("milliseconds of a round", headings, rows)]


def _prefill(report: Report) -> list[TableOf]:
    rows = [
        [
            str(row["tokens"]),
            f"{row['tokens_per_second']:,.0f}",
            f"{row['flops_per_second'] / 1e12:,.3f}",
            share_of_limit(report, "flops", row["flops_per_second"]),
        ]
        for row in report["parts"]["prefill"]["rows"]
    ]
    return [("prefill", ["tokens", "tokens/s", "TFLOP/s", "of the limit"], rows)]


def _simulated(report: Report) -> list[TableOf]:
    figures = report["parts"]["simulated"]
    rows = [
        [
            f"{row['acceptance']:g}",
            f"{row['tokens_per_round']:.2f}",
            f"{row['expected_tokens_per_round']:.2f}",
            f"{row['tokens_per_second']:,.1f}",
            f"{row['speedup']:.2f}",
        ]
        for row in figures["rows"]
    ]
    plain = ["plain", "1.00", "1.00", f"{figures['plain_tokens_per_second']:,.1f}", "1.00"]
    title = f"simulated acceptance; exit {figures['exit']} drafts {figures['drafted']} tokens"
    headings = ["acceptance", "tokens a round", "expected", "tokens/s", "beside plain"]
    return [(title, headings, [plain, *rows])]


def _training(report: Report) -> list[TableOf]:
    figures = report["parts"]["training"]
    cells = [
        f"{figures['rows']} x {figures['length']}",
        f"{figures['tokens_per_second']:,.0f}",
        f"{figures['flops_per_token'] / 1e9:,.4g}",
        f"{figures['flops_per_second'] / 1e12:,.3f}",
        share_of_limit(report, "flops", figures["flops_per_second"]),
    ]
    return [("training", ["rows", "tokens/s", "GFLOP per token", "TFLOP/s", "MFU"], [cells])]


_TABLES: dict[str, Callable[[Report], list[TableOf]]] = {
    "limits": _limits,
    "verify": _verify,
    "rounds": _rounds,
    "prefill": _prefill,
    "simulated": _simulated,
    "training": _training,
}


def _markdown(table: TableOf) -> str:
    _, headings, rows = table
    divider = ["---", *("---:" for _ in headings[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, divider, *rows))
