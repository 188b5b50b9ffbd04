"""``python -m fusedopt codegen``: compile every kernel variant without a GPU, hold the budgets."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fusedopt.cli import codegen_baseline, codegen_reports, codegen_tables
from fusedopt.cli.progress import progress
from fusedopt.cli.targets import problem as target_problem
from fusedopt.kernels import aot, lang

DEFAULT_TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "--target",
        action="append",
        metavar="cuda:90",
        help="cuda:<capability> or hip:gfx<number>, repeatable; default: "
        + ", ".join(DEFAULT_TARGETS),
    )
    parser.add_argument("--json", action="store_true", help="machine-readable output, nothing else")
    jobs = aot.processors()
    parser.add_argument(
        "--jobs",
        type=int,
        default=jobs,
        help=f"processes to compile with; default: one a processor, here {jobs}",
    )
    parser.add_argument(
        "--only", action="append", metavar="TEXT", help="variants whose names have it, repeatable"
    )
    parser.add_argument(
        "--instructions",
        action="store_true",
        help="count those that an element of a whole chunk takes, or a loop of products",
    )
    parser.add_argument(
        "--baseline", type=Path, metavar="FILE", help="hold every variant to what it used then"
    )
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="write a baseline, if no budget is broken"
    )
    parser.add_argument(
        "--reports",
        type=Path,
        metavar="FILE",
        help="compile only what is not in it, and one in"
        f" {codegen_reports.CHECKED} of the others, which must be the same",
    )
    parser.add_argument(
        "--record-reports", type=Path, metavar="FILE", help="write what was compiled, for --reports"
    )


def run(options: argparse.Namespace) -> int:
    """Compile, print a table, and return 1 if a budget is broken or more is used than was."""
    targets = options.target or list(DEFAULT_TARGETS)
    problem = _unusable(targets)
    if problem:
        print(f"codegen: {problem}", file=sys.stderr)
        return 2
    try:
        known = codegen_baseline.load(options.baseline) if options.baseline else None
        if options.reports:
            codegen_reports.load(options.reports)
    except ValueError as error:
        print(f"codegen: {error}", file=sys.stderr)
        return 2
    problem = _contradiction(options)
    if problem:
        print(f"codegen: {problem}", file=sys.stderr)
        return 2
    try:
        rows = list(
            _compile_all(
                targets,
                options.jobs,
                quiet=options.json,
                only=options.only or (),
                instructions=options.instructions,
                reports=options.reports,
                named=options.record_reports is not None,
            )
        )
    except BrokenProcessPool:
        print(
            f"codegen: a compiling process has ended by itself: does Triton {_triton_version()}"
            f" compile for {', '.join(targets)}? Otherwise memory ran out: try fewer --jobs",
            file=sys.stderr,
        )
        return 1
    broken = sum(bool(row["broken"]) for row in rows)
    result: dict[str, Any] = {"variants": rows, "broken": broken}
    if known is not None:
        result["baseline"] = codegen_baseline.compare(rows, known, _triton_version())
        result["regressed"] = sum(bool(row.get("regressed")) for row in rows)
    if not rows:
        print(f"codegen: no variant has {' or '.join(options.only)} in its name", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        codegen_tables.variants(rows, targets)
        if known is not None:
            codegen_tables.comparison(result)
        if options.reports:
            codegen_tables.kept(rows, options.reports)
    if options.record and broken:
        print(f"codegen: {options.record} is not written: budgets are broken", file=sys.stderr)
    elif options.record:
        codegen_baseline.record(options.record, rows, _triton_version())
        print(f"codegen: wrote {options.record}", file=sys.stderr)
    if options.record_reports:
        codegen_reports.record(options.record_reports, rows)
        print(f"codegen: wrote {options.record_reports}", file=sys.stderr)
    return 1 if broken or result.get("regressed") else 0


def _contradiction(options: argparse.Namespace) -> str | None:
    if options.only and (options.baseline or options.record):
        return "a baseline is of all variants: leave --only out"
    if options.only and options.record_reports:
        return "--record-reports is of all variants: leave --only out"
    if options.instructions and options.reports:
        return "--instructions are counted in machine code, which --reports has not"
    return None


def _triton_version() -> str:
    return str(lang.triton.__version__)


def _unusable(targets: Sequence[str]) -> str | None:
    if lang.triton is None:
        return lang.MISSING
    if lang.INTERPRETED:
        return "TRITON_INTERPRET=1 replaces the compiler: unset it"
    return target_problem(targets)


def _compile_all(
    targets: Sequence[str],
    jobs: int,
    quiet: bool,
    only: Sequence[str],
    instructions: bool,
    reports: Path | None,
    named: bool,
) -> Iterator[dict[str, Any]]:
    work = [
        (target, variant.name)
        for target in targets
        for variant in aot.variants(aot.parse_target(target))
        if not only or any(text in variant.name for text in only)
    ]
    compile_one = partial(compile_row, instructions=instructions, reports=reports, named=named)
    with (
        ProcessPoolExecutor(max(1, jobs), mp_context=get_context("spawn")) as pool,
        progress("compiling", quiet) as show,
    ):
        for done, row in enumerate(pool.map(compile_one, work, chunksize=4), 1):
            show(f"{row['target']} {row['variant']}", done, len(work))
            yield row


@cache
def _variants(target: str) -> dict[str, Any]:
    return {variant.name: variant for variant in aot.variants(aot.parse_target(target))}


def compile_row(
    work: tuple[str, str],
    instructions: bool = False,
    reports: Path | None = None,
    named: bool = False,
) -> dict[str, Any]:
    """Compile one variant for one target and say what it uses and which budgets it breaks.

    Variants travel between processes by name: a kernel cannot be pickled.

    Args:
        work: names of the target and of the variant.
        instructions: whether they are counted.
        reports: a file of ``codegen_reports``; what it has is ``kept``, and mostly not compiled.
        named: whether the row says the variant's ``identity``, for a file like that.
    """
    target_name, name = work
    target = aot.parse_target(target_name)
    variant = _variants(target_name)[name]
    row: dict[str, Any] = {
        "target": target_name,
        "variant": name,
        "kernel": variant.kernel.__name__,
    }
    if variant.coefficients:
        row["coefficients"] = list(variant.coefficients)
    kept, differences = None, []
    try:
        if named or reports:
            row["identity"] = aot.identity(variant, target)
        if reports:
            kept = codegen_reports.load(reports).get(row["identity"])
            row["kept"] = kept is not None
        if kept and not codegen_reports.is_checked(row["identity"]):
            result = kept
        else:
            compiled = aot.compile_variant(variant, target)
            result = aot.report(compiled, target)
            differences = codegen_reports.differences(kept, result) if kept else []
        if instructions:
            row["instructions_per_element"] = aot.instructions(compiled, target, variant)
    except Exception as error:  # noqa: BLE001 - whatever the compiler raises is a finding
        return {**row, "broken": [f"does not compile: {type(error).__name__}: {error}"[:600]]}
    return {
        **row,
        **codegen_reports.columns(result),
        "bytes_per_element": result.bytes_moved(variant),
        "broken": variant.budget.broken(variant, result, target) + differences,
    }
