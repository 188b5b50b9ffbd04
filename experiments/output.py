"""How a result is written down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from bench.harness.figures import save
from bench.harness.output import File


def write(result: dict[str, Any], figure: Figure, folder: Path) -> None:
    """Write NAME.json and NAME.png into the folder, which is made."""
    file = File(folder, result["experiment"])
    file.keep(result)
    save(figure, file.path(".png"))


def report(result: dict[str, Any], folder: Path, console: Console) -> None:
    """Print the claims with what was measured, and last, in one line, whether they hold."""
    table = Table(title=f"{result['title']} ({result['seconds']:.0f} s)")
    for column in ("claim", "measured", "bound", "holds"):
        table.add_column(column)
    for claim in result["claims"]:
        numbers = (f"{claim[key]:.4g}" for key in ("measured", "bound"))
        table.add_row(claim["claim"], *numbers, "yes" if claim["holds"] else "NO")
    console.print(table)
    console.print(f"Wrote {folder / result['experiment']}.json and .png", soft_wrap=True)
    failed = [claim["claim"] for claim in result["claims"] if not claim["holds"]]
    verdict = f"{len(failed)} DO NOT HOLD: {'; '.join(failed)}" if failed else "all HOLD"
    count = len(result["claims"])
    console.print(f"{result['experiment']}: of {count} claims {verdict}", soft_wrap=True)
