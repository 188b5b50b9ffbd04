"""Finds the fastest block and number of threads: ``python -m bench.tune [--write]``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.harness.output import write_json
from fusedopt.kernels import lang, launch_config
from fusedopt.kernels.rules import REGISTRY

from . import candidates
from .tuning import ELEMENTS, measure_with, tune, write

DEFAULT_TYPES = ("fp32", "bf16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line names.

    Returns:
        0; or 2 without a GPU.
    """
    options = _parse(arguments)
    if not torch.cuda.is_available() or lang.triton is None or lang.INTERPRETED:
        print(
            "python -m bench.tune needs a GPU and Triton without its interpreter: what it finds is"
            " for the GPU that it runs on",
            file=sys.stderr,
        )
        return 2
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from bench.harness.clock import Clock
    from bench.harness.environment import environment
    from fusedopt.kernels import aot

    device = torch.device("cuda", torch.cuda.current_device())
    target = aot.architecture(lang.triton.runtime.driver.active.get_current_target())
    asked = [
        (rule, types)
        for rule in options.rule or REGISTRY
        for types in options.types or DEFAULT_TYPES
    ]
    measure = measure_with(Clock(device))
    columns = (
        TextColumn("tuning"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    facts = environment(str(device))
    kept = "device", "driver", "torch", "triton", "commit", "uncommitted_changes", "date"
    origin = {name: facts[name] for name in kept}
    results: list[dict[str, Any]] = []

    def keep(so_far: Sequence[dict[str, Any]]) -> None:
        if options.out is not None:
            found = {"architecture": target, **origin, "results": so_far}
            write_json(options.out, found)

    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)
        for rule, types in asked:
            progress.update(task, description=f"{rule} {types}, compilations")
            complaints = candidates.complaints(rule, types, target)
            entries = candidates.work(REGISTRY[rule], types)
            steps = sum(len(candidates.candidates(entry.key)) + 1 for entry in entries)
            progress.reset(task, total=steps)
            for entry in entries:
                result = tune(
                    entry,
                    device,
                    lambda entry, candidate, known=complaints: known[entry.key, candidate],
                    measure,
                    options.elements,
                    lambda what: progress.update(task, advance=1, description=what),
                    lambda so_far: keep([*results, so_far]),
                )
                results.append(result)
                keep(results)
    if options.json:
        print(json.dumps({"architecture": target, **origin, "results": results}, indent=1))
    else:
        _show(results, f"{facts['device']}, {target}")
    if options.write:
        count = write(launch_config.TUNED, results, target, origin)
        print(f"{launch_config.TUNED}: {count} entries of {len(results)} tuned", file=sys.stderr)
    return 0


def _show(results: Sequence[dict[str, Any]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from bench.harness.tables import wide

    table = Table(title=f"{title}: block/threads, and time over the default's")
    for column in ("rule", "types", "default", "chosen", "ratio (quartiles)", "ruled out"):
        table.add_column(column)
    for result in results:
        tried = result["tried"]
        timed = {key: x for key, x in tried.items() if "ratio" in x and key != result["default"]}
        cells = "no other will do", "-"
        if timed:
            best = min(timed, key=lambda key: (not timed[key].get("final"), timed[key]["ratio"]))
            best = result["chosen"]["name"] if result["chosen"] else best
            low, high = timed[best]["ratio_quartiles"]
            chosen = best if result["chosen"] else f"default; the best other is {best}"
            cells = chosen, f"{timed[best]['ratio']:.3f} ({low:.3f} to {high:.3f})"
        ruled_out = sum("ruled_out" in x for x in tried.values())
        names = result["rule"], result["types"], result["default"]
        table.add_row(*names, *cells, str(ruled_out))
    wide(Console()).print(table)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench.tune", description=__doc__)
    add = parser.add_argument
    add("--rule", action="append", choices=list(REGISTRY), help="repeatable (all)")
    default = " and ".join(DEFAULT_TYPES)
    add("--types", action="append", choices=list(candidates.TYPES), help=f"repeatable ({default})")
    add("--elements", type=int, default=ELEMENTS, help="of each operand (2^28)")
    add("--write", action="store_true", help="bring kernels/tuned.json up to date")
    add("--out", type=Path, metavar="FILE", help="JSON, written as it goes on")
    add("--json", action="store_true", help="machine-readable output, nothing else")
    options = parser.parse_args(arguments)
    if options.elements < 1:
        parser.error(f"--elements {options.elements}: at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
