"""``python -m fusedopt precompile``: fill a Triton cache before the first GPU is there.

Thousands of processes that each compile at their first step wait for seconds, and for a shared file
system. From a cache that this command has filled they compile nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from fusedopt import Telemetry
from fusedopt.cli import precision
from fusedopt.cli import precompile_report as report
from fusedopt.cli.progress import progress
from fusedopt.cli.targets import problem as target_problem
from fusedopt.kernels import aot, lang
from fusedopt.kernels.rules import REGISTRY
from fusedopt.precompile.request import Request


class Problem(Exception):
    """What keeps the command from starting; the message is for the user."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = report.HELP
    parser.add_argument(
        "--target",
        action="append",
        metavar="cuda:90",
        help="cuda:<capability> or hip:gfx<number>, repeatable; default: this machine's GPUs",
    )
    parser.add_argument(
        "--cache", metavar="DIR", help="the cache; default: the one that Triton takes here"
    )
    parser.add_argument(
        "--rule", action="append", metavar="Adam", help="only this rule, repeatable; default: all"
    )
    parser.add_argument(
        "--types",
        action="append",
        metavar="bf16",
        help="only tensors of these element types, repeatable (fp32 bf16 fp16 fp64); default: all",
    )
    parser.add_argument(
        "--import",
        action="append",
        dest="imports",
        metavar="MODULE",
        help="a module that registers rules of your own, repeatable",
    )
    parser.add_argument(
        "--statistics",
        action="store_true",
        help="per-sample squares of usual layers, too; their kernels depend on shapes",
    )
    precision.add_arguments(parser)
    parser.add_argument(
        "--telemetry",
        action="store_true",
        help="steps with telemetry=fusedopt.Telemetry(), and none without",
    )
    jobs = aot.processors()
    parser.add_argument(
        "--jobs",
        type=int,
        default=jobs,
        help=f"processes to compile with; default: one a processor, here {jobs}",
    )
    parser.add_argument("--json", action="store_true", help="machine-readable output, nothing else")


def run(options: argparse.Namespace) -> int:
    """Compile, print what came of it, and return 1 if anything failed to compile."""
    begin = time.perf_counter()
    try:
        request = _check(options)
    except Problem as problem:
        print(f"precompile: {problem}", file=sys.stderr)
        return 2
    from fusedopt.precompile import pool, record

    try:
        with progress("", options.json) as step:
            rows, c_modules = pool.compile_all(request, step)
        record.write(request.cache, rows, request.targets)
    except OSError as error:
        print(f"precompile: the cache cannot be written: {error}", file=sys.stderr)
        return 2
    except BrokenProcessPool:
        print(
            "precompile: a compiling process has ended by itself: does this Triton compile for"
            f" {', '.join(request.targets)}? Otherwise memory ran out: try fewer --jobs. What was"
            " compiled until then stays",
            file=sys.stderr,
        )
        return 1
    seconds = time.perf_counter() - begin
    by_default = options.cache is None and "TRITON_CACHE_DIR" not in os.environ
    environment = {} if by_default else {"TRITON_CACHE_DIR": str(request.cache)}
    result = report.summary(rows, request.targets, request.cache, c_modules, environment, seconds)
    amd = any(target.startswith("hip") for target in request.targets)
    result["notes"] = report.notes(options.statistics, amd)
    if options.json:
        print(json.dumps({**result, "variants": rows}, indent=2))
    else:
        report.print_all(result, rows)
    return 1 if any(row["error"] for row in rows) else 0


def _check(options: argparse.Namespace) -> Request:
    if lang.triton is None:
        raise Problem(str(lang.MISSING))
    if lang.INTERPRETED:
        raise Problem("TRITON_INTERPRET=1 replaces the compiler: unset it")
    from triton import knobs

    if knobs.compilation.always_compile:
        raise Problem("TRITON_ALWAYS_COMPILE=1 passes over every cache: unset it")
    if options.jobs < 1:
        raise Problem(f"--jobs must be at least 1, got {options.jobs}")
    _import(options.imports or [])
    targets = list(dict.fromkeys(options.target or _own_targets()))
    wrong = target_problem(targets)
    if wrong is not None:
        raise Problem(wrong)
    rules = [_rule(name) for name in options.rule or []]
    unknown = [name for name in options.types or [] if name not in aot.DTYPES]
    if unknown:
        raise Problem(f"no type {unknown[0]!r}: there are {', '.join(aot.DTYPES)}")
    asked = _precision(options, rules)
    if options.cache == "":
        raise Problem("--cache is empty: name a folder, or leave the option out")
    # Not resolved: entries hold this path, and ranks must come by the same.
    cache = Path(os.path.abspath(options.cache or knobs.cache.dir))
    _make_writable(cache)
    return Request(
        targets=tuple(targets),
        rules=tuple(rules),
        types=tuple(options.types or ()),
        cache=cache,
        imports=tuple(options.imports or ()),
        statistics=options.statistics,
        precision=asked,
        jobs=options.jobs,
    )


def _precision(options: argparse.Namespace, rules: Sequence[str]) -> dict[str, Any]:
    """Return the options of precision, of which at least one rule must know what to make."""
    from fusedopt.precompile.cases import problem

    try:
        chosen = precision.chosen(options)
    except ValueError as error:
        raise Problem(str(error)) from None
    wanted = [REGISTRY[name] for name in rules] or list(REGISTRY.values())
    found = [problem(r, {**group, **chosen}) for r in wanted for group in r.example_groups]
    if None not in found:
        raise Problem(found[0])
    # Of two steps one is measured, and one is not.
    return chosen | ({"telemetry": Telemetry(every=2)} if options.telemetry else {})


def _import(names: Sequence[str]) -> None:
    before = len(REGISTRY)
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise Problem(f"--import {name}: {error}") from None
    if names and len(REGISTRY) == before:
        raise Problem(
            f"{', '.join(names)} registered no rule: call fusedopt.kernels.rules.register there"
        )


def _own_targets() -> list[str]:
    """Name what the GPUs of this machine are."""
    if not torch.cuda.is_available():
        raise Problem("there is no GPU here: say what to compile for, as in --target cuda:90")
    found = []
    for index in range(torch.cuda.device_count()):
        if torch.version.hip is None:
            major, minor = torch.cuda.get_device_capability(index)
            found.append(f"cuda:{10 * major + minor}")
        else:
            name = torch.cuda.get_device_properties(index).gcnArchName
            found.append(f"hip:{name.partition(':')[0]}")
    return found


def _rule(name: str) -> str:
    """Return the rule of a name, which may be that of an optimizer."""
    classes = {key: value.rule.name for key, value in precision.optimizers().items()}
    names = {**classes, **{rule: rule for rule in REGISTRY}}
    if name not in names:
        raise Problem(f"no rule {name!r}: there are {', '.join(sorted(names))}")
    return names[name]


def _make_writable(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache):
            pass
    except OSError as error:
        raise Problem(f"cannot write to {cache}: {error.strerror}") from None
