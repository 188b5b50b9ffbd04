"""Runs experiments, prints what they claim, and writes a JSON and a PNG for each."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench.harness.environment import environment

from . import NAMES, output

HERE = Path(__file__).resolve().parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line names; 1 where a claim does not hold."""
    options = _parse(arguments)
    # What these models multiply is too small to share out among threads.
    torch.set_num_threads(1)
    results = [run(name, options) for name in options.names or NAMES]
    return 0 if all(claim["holds"] for result in results for claim in result["claims"]) else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m experiments", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)} (all)")
    parser.add_argument("--reduced", action="store_true", help="a small size, seconds each")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="for JSON and PNG (experiments/results/DEVICE; with --reduced, experiments/out)",
    )
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in NAMES:
            parser.error(f"no experiment {name!r}: there are {', '.join(NAMES)}")
    if options.out is None:
        options.out = HERE / ("out" if options.reduced else f"results/{options.device}")
    return options


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one experiment, print its claims and write its files."""
    module = importlib.import_module(f".{name}", __package__)
    settings = {**module.FULL, **(module.REDUCED if options.reduced else {})}
    settings["device"] = options.device
    begin = time.perf_counter()
    columns = TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        figures = module.run(settings, progress)
    result = {
        "experiment": name,
        "title": module.TITLE,
        "reduced": options.reduced,
        "settings": settings,
        "environment": environment(options.device),
        "seconds": time.perf_counter() - begin,
        "figures": figures,
    }
    keys = ("claim", "measured", "bound", "holds")
    result["claims"] = [dict(zip(keys, claim, strict=True)) for claim in module.claims(result)]
    output.write(result, module.draw(result), options.out)
    output.report(result, options.out, Console())
    return result


if __name__ == "__main__":
    sys.exit(main())
