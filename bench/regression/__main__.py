"""Checks that speed has not been lost: ``python -m bench.regression host``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness.places import BASELINES

# The parameters are on the CPU, where the Triton backend takes them only for the interpreter; no
# kernel runs. Before anything imports Triton: the decorator decides by it.
os.environ["TRITON_INTERPRET"] = "1"

BASELINE = BASELINES / "host.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line names.

    Returns:
        0; or 1 where something has become slower, or 2 without a baseline.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    from . import judge
    from .host import CASES, MODES

    options = _parse(arguments)
    columns = TextColumn("host time"), BarColumn(), TextColumn("{task.description}")
    try:
        baseline = None if options.record else judge.load(options.baseline)
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("", total=len(CASES) * len(MODES))

            def advance(name: str) -> None:
                progress.update(task, description=name, advance=1)

            if baseline is None:
                judge.save(options.baseline, judge.record(advance=advance))
                print(f"wrote {options.baseline}")
                return 0
            rows = judge.check(baseline, advance=advance)
    except ValueError as error:
        print(f"bench.regression: {error}", file=sys.stderr)
        return 2
    slower = [row for row in rows if row["slower"]]
    if options.json:
        print(json.dumps({"rows": rows, "slower": len(slower)}, indent=1))
    else:
        _show(rows)
    return 1 if slower else 0


def _show(rows: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from bench.harness.tables import wide

    table = Table(title="host time of step(), and calls of Python, without the launch")
    for column in ("class", "gradients", "over torch"):
        table.add_column(column)
    for column in ("ratio", "baseline", "calls (a tensor)", "baseline"):
        table.add_column(column, justify="right")
    table.add_column("slower")
    for row in rows:
        figures = row["ratio"], row["baseline_ratio"]
        table.add_row(
            row["class"], row["mode"], row["against"], *(f"{x:.3f}" for x in figures),
            *(f"{row[x]} ({row[x + '_a_tensor']:g})" for x in ("calls", "baseline_calls")),
            "; ".join(row["slower"]) or "-",
        )  # fmt: skip
    wide(Console(), 120).print(table)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench.regression", description=__doc__)
    parser.add_argument("what", choices=("host",), help="the host time of step()")
    parser.add_argument("--baseline", type=Path, default=BASELINE, help="(bench/baselines)")
    parser.add_argument("--record", action="store_true", help="write the baseline instead")
    parser.add_argument("--json", action="store_true", help="machine-readable output, nothing else")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
