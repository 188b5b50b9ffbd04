"""What ``codegen`` prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusedopt.cli import codegen_reports

Row = dict[str, Any]


def variants(rows: Sequence[Row], targets: Sequence[str]) -> None:
    """Print a table of each target, and how many variants break a budget."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        # A log file has no edge: numbers must not be cut off at 80 columns.
        console = Console(width=120)
    for target in targets:
        table = Table(title=f"{target}: what each variant uses")
        table.add_column("variant", no_wrap=True)
        for column in ("registers", "stack", "shared", "B/element", "128-bit ld/st"):
            table.add_column(column, justify="right")
        counted = any("instructions_per_element" in row for row in rows)
        if counted:
            table.add_column("instructions/element, or of the loop", justify="right")
        table.add_column("matrix")
        table.add_column("broken budgets, and more than the baseline")
        for row in (r for r in rows if r["target"] == target):
            complaints = [*row["broken"], *row.get("regressed", [])]
            table.add_row(row["variant"], *_cells(row, counted), "; ".join(complaints) or "-")
        console.print(table)
    broken = sum(bool(row["broken"]) for row in rows)
    console.print(
        f"{len(rows)} variants compiled for {len(targets)} targets, {broken} break a budget. "
        "B/element: bytes that whole chunks of aligned tensors move; of embeddings, what is read."
    )


def comparison(result: Row) -> None:
    """Print how the rows of a result compare with its baseline."""
    found = result["baseline"]
    if found["note"]:
        print(found["note"])
        return
    for what in ("new", "removed"):
        for name in found[what]:
            print(f"{name}: {'not in' if what == 'new' else 'only in'} the baseline")
    print(
        f"{found['compared']} variants compared with the baseline of Triton {found['triton']}:"
        f" {result['regressed']} use more"
    )


def kept(rows: Sequence[Row], path: Path) -> None:
    """Print how many variants were not compiled, since a file of reports has them."""
    known = [row for row in rows if row.get("kept")]
    checked = sum(codegen_reports.is_checked(row["identity"]) for row in known)
    print(f"{len(known)} variants are as in {path}, of which {checked} were compiled for a check")
    if len(known) < len(rows):
        print(f"{len(rows) - len(known)} are not: --record-reports {path} adds them")


def _cells(row: Row, counted: bool) -> list[str]:
    if "registers" not in row:
        return ["-"] * (6 + counted)
    count = row.get("instructions_per_element") or row.get("loop")
    wide = f"{row['loads'].get('128', 0)}/{row['stores'].get('128', 0)}"
    moved = row["bytes_per_element"]
    return [
        str(row["registers"]),
        str(row["stack"]),
        str(row["shared"]),
        f"{moved:g}" if moved else "-",
        wide,
        *([f"{count:.0f}" if count else "-"] if counted else []),
        ", ".join(row["matrix"]) or "-",
    ]
