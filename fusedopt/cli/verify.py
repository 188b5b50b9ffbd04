"""``python -m fusedopt verify``: the kernels against the reference, on this machine."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from fusedopt import backends
from fusedopt.cli import verify_formats, verify_samples
from fusedopt.cli.progress import progress
from fusedopt.kernels import lang
from fusedopt.kernels.rules import REGISTRY
from fusedopt.testing import STEPS, UNDECIDED, UPDATE, compare

Item = TypeVar("Item")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default=default,
        help=f"cuda: kernels compiled for the GPU; cpu: in Triton's interpreter ({default})",
    )
    parser.add_argument("--json", action="store_true", help="machine-readable output, nothing else")


def run(options: argparse.Namespace) -> int:
    """Compare every rule in every type, print a table, and return 1 on any failure."""
    if options.device == "cuda" and not torch.cuda.is_available():
        print("verify: there is no CUDA or ROCm device; use --device cpu", file=sys.stderr)
        return 2
    if lang.triton is None:
        print(f"verify: no kernel can run here. {lang.MISSING}", file=sys.stderr)
        return 2
    if lang.INTERPRETED != (options.device == "cpu"):
        # The kernels were made for the other mode when Triton's decorator ran.
        environment = {**os.environ, "TRITON_INTERPRET": str(int(options.device == "cpu"))}
        arguments = ["--device", options.device, *(["--json"] if options.json else [])]
        command = [sys.executable, "-m", "fusedopt", "verify", *arguments]
        return subprocess.run(command, env=environment, check=False).returncode
    device = torch.device(options.device)
    with _overflow_unannounced():
        rows = list(_compare_all(device, quiet=options.json))
        formats = list(_compare_formats(device, quiet=options.json))
        operations = list(_compare_operations(device, quiet=options.json))
    failed = [row for row in (*rows, *formats, *operations) if not row["passed"]]
    if options.json:
        found = {"rows": rows, "formats": formats, "operations": operations, "failed": len(failed)}
        print(json.dumps({"device": options.device, **found}, indent=2))
    else:
        _print_table(rows, options.device)
        _print_formats(formats)
        _print_operations(operations)
    return 1 if failed else 0


@contextmanager
def _overflow_unannounced() -> Iterator[None]:
    """Keep numpy, which the interpreter computes with, from warning of infinities.

    They are what the kernels are to make: a narrow type overflows, as it does on a GPU, and the
    results are compared whatever they are. A warning would look like a failure.
    """
    if not lang.INTERPRETED:
        yield
        return
    import numpy

    with numpy.errstate(all="ignore"):
        yield


def _compare_all(device: torch.device, quiet: bool) -> Iterator[dict[str, Any]]:
    cases = [(rule, dtype) for rule in REGISTRY.values() for dtype in UPDATE]
    title = f"comparing {len(REGISTRY)} rules in {len(UPDATE)} types"
    for rule, dtype in _tracked(cases, title, len(cases), quiet):
        found = [compare(rule, group, dtype, device) for group in rule.example_groups]
        yield {
            "rule": rule.name,
            "dtype": str(dtype).removeprefix("torch."),
            "groups": len(found),
            "coefficients": list(rule.coefficient_names),
            "worst_ulps": max((c.ulps for c in found), default=0.0),
            "tolerance_ulps": UPDATE[dtype].ulps,
            "undecided": sum(c.undecided for c in found),
            "compared": sum(c.compared for c in found),
            "passed": all(c.passed for c in found) and any(c.moved for c in found),
        }


def _compare_formats(device: torch.device, quiet: bool) -> Iterator[dict[str, Any]]:
    rows = verify_formats.compare_all(device)
    yield from _tracked(rows, "formats", len(verify_formats.FORMATS), quiet)


def _compare_operations(device: torch.device, quiet: bool) -> Iterator[dict[str, Any]]:
    total = len(verify_samples.OPERATIONS) * len(verify_samples.DTYPES)
    rows = verify_samples.compare_all(device)
    yield from _tracked(rows, "per-sample kernels", total, quiet)


def _tracked(items: Iterable[Item], title: str, total: int, quiet: bool) -> Iterator[Item]:
    with progress(title, quiet) as show:
        for done, item in enumerate(items):
            show("", done, total)
            yield item


def _print_table(rows: list[dict[str, Any]], device: str) -> None:
    from rich.console import Console
    from rich.table import Table

    name = torch.cuda.get_device_name() if device == "cuda" else "the CPU, in the interpreter"
    table = Table(title=f"kernels against reference on {name}, each of {STEPS} steps")
    table.add_column("rule", no_wrap=True)
    table.add_column("type")
    for column in ("option sets", "worst ulps", "tolerance", "undecided"):
        table.add_column(column, justify="right")
    table.add_column("")
    for row in rows:
        table.add_row(
            row["rule"],
            row["dtype"],
            str(row["groups"]),
            f"{row['worst_ulps']:.3g}",
            f"{row['tolerance_ulps']:g}",
            str(row["undecided"]),
            "ok" if row["passed"] else "FAILED",
        )
    console = Console()
    console.print(table)
    console.print(
        "undecided: elements further apart, but no further than the rounding of what is read moves"
        f" the reference's own results; at most {UNDECIDED:.0%} of an option set"
    )
    console.print(f"backend: {backends.choose(device)[1]}")


def _print_formats(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="formats of parameters and states: bits that differ, and a step of Adam")
    table.add_column("format")
    table.add_column("type")
    for column in ("differ", "worst ulps", "tolerance"):
        table.add_column(column, justify="right")
    table.add_column("")
    for row in rows:
        passed = "ok" if row["passed"] else "FAILED"
        ulps = f"{row['worst_ulps']:.3g}", f"{row['tolerance_ulps']:g}"
        table.add_row(row["format"], row["dtype"], str(row["differing"]), *ulps, passed)
    Console().print(table)


def _print_operations(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="per-sample kernels against float64, as a share of the terms summed")
    table.add_column("operation")
    table.add_column("type")
    for column in ("worst", "tolerance"):
        table.add_column(column, justify="right")
    table.add_column("")
    for row in rows:
        passed = "ok" if row["passed"] else "FAILED"
        shares = f"{row['worst']:.2g}", f"{row['tolerance']:.2g}"
        table.add_row(row["operation"], row["dtype"], *shares, passed)
    Console().print(table)
