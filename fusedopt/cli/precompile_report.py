"""What ``precompile`` says: counts, what to set at run time, what is left out."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HELP = """\
The cache then serves the same versions of Triton, PyTorch and fusedopt, under
the same path (entries hold it) and with the same TRITON_* variables.
fusedopt.json in it says which.

On AMD, Triton must be installed under the same path, too, and builds one C
module at its first launch.

Kernels of per-sample squares depend on the shapes of layers, which are not
known here. Without --statistics they are left out; with it, left out are
convolutions, widths that are no multiples of 16, transposed or sliced inputs,
and float32 matrix products in tf32. Left out in any case: per-sample gradients
in lists, and option sets that no combination of a rule's example groups shows.
What is left out is compiled when it is first used.

Steps are taken with the options of precision that are given (--states,
--master, --rounding, --average, --telemetry), and with none without: one run
for each that parameter groups have, into the same cache. Left out of those is
what only shards need that are cut along an inner dimension and rounded
stochastically.

With TRITON_STORE_BINARY_ONLY=1 entries take a third of the space, without what
debugging needs.
"""


def notes(statistics: bool, amd: bool) -> list[str]:
    """Say in short what the cache is good for, and what it does not hold.

    Args:
        statistics: whether kernels of per-sample squares were asked for.
        amd: whether an AMD GPU was.
    """
    found = ["It serves these versions (fusedopt.json) and TRITON_* variables, under this path."]
    if amd:
        found.append(
            "On AMD, Triton must be installed under the same path, too, and builds one C module at"
            " its first launch."
        )
    if statistics:
        found.append("Per-sample squares of layers of unusual shapes are left out: see --help.")
    else:
        found.append("Per-sample squares are left out, since they depend on shapes: --statistics.")
    return found


def summary(
    rows: Sequence[dict[str, Any]],
    targets: Sequence[str],
    cache: Path,
    c_modules: dict[str, Any],
    environment: dict[str, str],
    seconds: float,
) -> dict[str, Any]:
    """Count by target.

    Args:
        rows: of ``work.compile_task``.
        targets: in the order to be told.
        cache: its directory.
        c_modules: how many were built, and the problem if they were not.
        environment: variables that processes need to find the cache.
        seconds: on the clock, for everything.
    """
    return {
        "cache": str(cache),
        "seconds": seconds,
        "targets": [_of_target(target, rows) for target in targets],
        "c_modules": c_modules,
        "environment": environment,
    }


def _of_target(target: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    own = [row for row in rows if row["target"] == target]
    failed = [row for row in own if row["error"]]
    there = [row for row in own if row["cached"]]
    return {
        "target": target,
        "compiled": len(own) - len(there) - len(failed),
        "there": len(there),
        "failed": len(failed),
        "seconds": sum(row["seconds"] for row in own),
        "bytes": sum(row["bytes"] for row in own),
    }


def print_all(result: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Print a table of targets, what failed, and what to do at run time."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Triton cache {result['cache']}")
    table.add_column("target")
    for column in ("compiled", "already there", "failed", "compiler s", "MB"):
        table.add_column(column, justify="right")
    for line in result["targets"]:
        table.add_row(
            line["target"],
            *(str(line[name]) for name in ("compiled", "there", "failed")),
            f"{line['seconds']:.1f}",
            f"{line['bytes'] / 1e6:.1f}",
        )
    console = Console()
    console.print(table)
    # Not wrapped, nor read as markup: lines are copied into scripts.
    for row in rows:
        if row["error"]:
            print(f"failed: {row['target']} {row['variant']}: {row['error']}")
    problem = result["c_modules"]["problem"]
    print(f"C modules built: {result['c_modules']['built']}" + (f" ({problem})" if problem else ""))
    print(f"{result['seconds']:.1f} s in all.")
    for name, value in result["environment"].items():
        print(f"Every process that trains needs: export {name}={shlex.quote(value)}")
    if not result["environment"]:
        print("Nothing is to be set: this is where Triton looks by itself, for this user.")
    for note in result["notes"]:
        print(note)
