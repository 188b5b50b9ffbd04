"""The summary of a run: a table, and the same as JSON and Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.harness.output import plain, write_json, write_whole

# More of one command's output is not needed to understand it, and the files have to stay small.
HEAD, TAIL = 200_000, 800_000

# Stages that write a result, and bytes that one has at most.
KEPT = ("step", "streams", "per-sample", "training", "tune", "first-step")
LARGEST = 4_000_000


def write(summary: Mapping[str, Any], folder: Path) -> None:
    """Write summary.json and summary.md."""
    write_json(folder / "summary.json", summary)
    write_whole(folder / "summary.md", markdown(summary))


def collect(work: Path, folder: Path) -> None:
    """Write results.json, one file of what the stages' commands wrote in folders of their own."""
    found: dict[str, Any] = {}
    for path in sorted(work.glob("*/*.json")):
        # A command may have written anything.
        try:
            if path.parent.name in KEPT and path.stat().st_size < LARGEST:
                found[path.parent.name] = plain(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError):
            found[path.parent.name] = None
    if found:
        write_json(folder / "results.json", found)


def log(folder: Path, heading: str, output: str, errors: str) -> None:
    """Append what a command printed to log.txt."""
    with (folder / "log.txt").open("a", encoding="utf-8") as file:
        file.write(f"===== {heading} =====\n{_shortened(output)}")
        if errors:
            file.write(f"----- standard error -----\n{_shortened(errors)}")
        file.write("\n")


def _shortened(text: str) -> str:
    if len(text) > HEAD + TAIL:
        left_out = len(text) - HEAD - TAIL
        text = f"{text[:HEAD]}\n[... {left_out} characters ...]\n{text[-TAIL:]}"
    return text if not text or text.endswith("\n") else text + "\n"


def markdown(summary: Mapping[str, Any]) -> str:
    """Return the summary as Markdown."""
    lines = [
        f"# {summary['device']}, {summary['date']}",
        "",
        f"Target {summary['target']}, commit {summary['commit'] or 'unknown'},"
        f" {summary['seconds']:.0f} s.",
        "",
        "| stage | result | s | |",
        "|---|---|---|---|",
    ]
    for stage in summary["stages"]:
        cells = stage["stage"], stage["result"], f"{stage['seconds']:.0f}", told(stage)
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def told(stage: Mapping[str, Any]) -> str:
    """Say a stage's key figures, and why it is not passed, in one line."""
    figures = [
        f"{name} {_number(value)}" for name, value in stage["figures"].items() if value is not None
    ]
    reason = " ".join(stage["reason"].split()) if stage["reason"] else ""
    return "; ".join([*([reason[:300]] if reason else []), ", ".join(figures)]).strip("; ")


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def show(summary: Mapping[str, Any]) -> None:
    """Print the table on standard output."""
    from rich.console import Console
    from rich.table import Table

    from bench.harness.tables import wide

    title = f"{summary['device']}, {summary['target']}, {summary['seconds']:.0f} s"
    table = Table(title=title)
    for column in ("stage", "result"):
        table.add_column(column, no_wrap=True)
    table.add_column("s", justify="right")
    table.add_column("key figures")
    for stage in summary["stages"]:
        table.add_row(stage["stage"], stage["result"], f"{stage['seconds']:.0f}", told(stage))
    wide(Console()).print(table, markup=False)
