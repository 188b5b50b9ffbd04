"""The summary of a run: a table, and the same as JSON and Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# More of one command's output is not needed to understand it, and the files have to stay small.
HEAD, TAIL = 200_000, 800_000


def write(summary: Mapping[str, Any], folder: Path) -> None:
    """Write summary.json and summary.md."""
    text = json.dumps(summary, indent=1)
    (folder / "summary.json").write_text(text + "\n", encoding="utf-8")
    (folder / "summary.md").write_text(markdown(summary), encoding="utf-8")


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

    title = f"{summary['device']}, {summary['target']}, {summary['seconds']:.0f} s"
    table = Table(title=title)
    for column in ("stage", "result"):
        table.add_column(column, no_wrap=True)
    table.add_column("s", justify="right")
    table.add_column("key figures")
    for stage in summary["stages"]:
        table.add_row(stage["stage"], stage["result"], f"{stage['seconds']:.0f}", told(stage))
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(table, markup=False)
