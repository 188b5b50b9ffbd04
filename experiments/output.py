"""How a result is written down."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table


def write(result: dict[str, Any], figure: Figure, folder: Path) -> None:
    """Write NAME.json and NAME.png into the folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / result["experiment"]
    text = json.dumps(_plain(result), indent=1, allow_nan=False)
    file.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    figure.savefig(file.with_suffix(".png"), dpi=110)


def _plain(value: Any) -> Any:
    """Return what strict JSON can say: null for what is not finite, and no more digits than mean
    something.
    """
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value


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
