"""What a run prints."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from bench.harness.tables import mebibytes

from . import busy
from .contenders import OURS


def report(result: dict[str, Any], console: Console) -> None:
    """Print times, memory and aims."""
    if not result["measurement"]:
        console.print(f"[bold]Not a measurement:[/bold] {result['note']}.")
    for case in result["linear"]:
        console.print(_linear(case))
    if result["linear"]:
        console.print(_shares(result["linear"]))
        console.print(busy.table())
    if result["training"] is not None:
        console.print(_training(result["training"]))
    console.print(_aims(result["aims"]))
    for failure in result["failed"]:
        console.print(f"FAILED {failure}", style="bold red", markup=False, soft_wrap=True)


def _linear(case: dict[str, Any]) -> Table:
    title = f"{case['shape']} in {case['arithmetic']}"
    columns = ("contender", "ms", "over plain (quartiles)", "host ms", "peak MiB", "code")
    table = Table(*columns, title=title)
    for entry in case["contenders"].values():
        if "median" not in entry:
            table.add_row(entry["title"], entry["status"], entry.get("reason"))
            continue
        low, high = entry["ratio_quartiles"]
        table.add_row(
            entry["title"],
            f"{entry['median']:.4g}",
            f"{entry['ratio']:.3f} ({low:.3f} to {high:.3f})",
            f"{entry['host_median']:.3g}",
            mebibytes(entry["peak_bytes"]),
            entry["source"],
        )
    return table


def _shares(cases: list[dict[str, Any]]) -> Table:
    """Tabulate how near to the library's pace gradient and squares are formed."""
    title = (
        "Pace of gradient and squares, as a share of cuBLAS's (rocBLAS's) for the gradient alone"
    )
    table = Table("shape", "layer", "arithmetic", "share of cuBLAS", title=title)
    names = {str(shape): ", ".join(layers) for shape, layers in busy.shapes().items()}
    for case in cases:
        ratio = case["contenders"][OURS]["ratio"]
        name = names.get(case["shape"], "")
        table.add_row(case["shape"], name, case["arithmetic"], f"{1 / ratio:.3f}")
    return table


def _training(step: dict[str, Any]) -> Table:
    title = f"Training step, {step['parameters']:,} parameters, batch {step['batch']}"
    table = Table("statistics", "ms (quartiles)", "host ms", "peak MiB", title=title)
    for name in ("without", "with"):
        entry = step[name]
        low, high = entry["quartiles"]
        table.add_row(
            name,
            f"{entry['median']:.4g} ({low:.4g} to {high:.4g})",
            f"{entry['host_median']:.4g}",
            mebibytes(entry["peak_bytes"]),
        )
    return table


def _aims(aims: list[dict[str, Any]]) -> Table:
    table = Table("aim", "measured", "bound", "holds", title="Aims")
    for aim in aims:
        measured = "-" if aim["measured"] is None else f"{aim['measured']:.4g}"
        holds = {None: "not judged", True: "yes", False: "NO"}[aim["holds"]]
        table.add_row(aim["aim"], measured, f"{aim['bound']:.4g}", holds)
    return table
