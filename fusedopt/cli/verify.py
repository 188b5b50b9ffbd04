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
from torch import Tensor

from fusedopt import FusedOptimizer, Rule, backends
from fusedopt.cli import verify_samples
from fusedopt.cli.progress import progress
from fusedopt.kernels import lang
from fusedopt.kernels.rules import REGISTRY
from fusedopt.memory.dtypes import compute_dtype
from fusedopt.source import RuleInputs
from fusedopt.statistics import Statistics
from fusedopt.testing import TRAJECTORY, worst_ulps

Item = TypeVar("Item")

STEPS = 5

# Whole chunks, ragged ones, scalars, and none at all.
SHAPES = ((1024,), (2500,), (3, 5, 7), (), (0,), (1,))


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
        operations = list(_compare_operations(device, quiet=options.json))
    failed = [row for row in (*rows, *operations) if not row["passed"]]
    if options.json:
        found = {"rows": rows, "operations": operations, "failed": len(failed)}
        print(json.dumps({"device": options.device, **found}, indent=2))
    else:
        _print_table(rows, options.device)
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
    cases = [(rule, dtype) for rule in REGISTRY.values() for dtype in TRAJECTORY]
    title = f"comparing {len(REGISTRY)} rules in {len(TRAJECTORY)} types"
    for rule, dtype in _tracked(cases, title, len(cases), quiet):
        worst, still = 0.0, True
        for group in rule.example_groups:
            distance, moved = compare(rule, group, dtype, device)
            worst, still = max(worst, distance), still and not moved
        yield {
            "rule": rule.name,
            "dtype": str(dtype).removeprefix("torch."),
            "groups": len(rule.example_groups),
            "coefficients": list(rule.coefficient_names),
            "worst_ulps": worst,
            "tolerance_ulps": TRAJECTORY[dtype].ulps,
            "passed": worst <= TRAJECTORY[dtype].ulps and not still,
        }


def _compare_operations(device: torch.device, quiet: bool) -> Iterator[dict[str, Any]]:
    total = len(verify_samples.OPERATIONS) * len(verify_samples.DTYPES)
    rows = verify_samples.compare_all(device)
    yield from _tracked(rows, "per-sample kernels", total, quiet)


def _tracked(items: Iterable[Item], title: str, total: int, quiet: bool) -> Iterator[Item]:
    with progress(title, quiet) as show:
        for done, item in enumerate(items):
            show("", done, total)
            yield item


class PowersOfGradients(Statistics):
    """What a rule with more inputs runs on: powers of the gradient, and the group's own factors."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule

    def count_of(self, parameter: Tensor) -> int:
        """Return a number; the groups' factors do not depend on it."""
        return 1

    def sum_of_squares(self, parameter: Tensor) -> Tensor | None:
        """Return the squared gradient."""
        gradient = parameter.grad
        if gradient is None:
            return None
        return gradient.to(compute_dtype([parameter.dtype, gradient.dtype])).square()

    def inputs(self, parameters: list[Tensor], gradients: list[Tensor], plain: bool) -> RuleInputs:
        """Return gradients and squares as the rule asks for them."""
        squares = [self._squares(p) for p in parameters] if 2 in self.rule.degrees else []
        return RuleInputs(
            [
                [another(g, i) for g in gradients] if degree == 1 else squares
                for i, degree in enumerate(self.rule.degrees)
            ]
        )

    def factors(self, virtual_batch_size: float, count: int) -> dict[str, float]:
        """Leave the factors that the parameter group states."""
        return {}


def another(gradient: Tensor, i: int) -> Tensor:
    """Return what input i is if its degree is 1: no two the same, or weights could be exchanged."""
    return gradient * (1 + i)


def statistics_for(rule: Rule) -> Statistics | None:
    """Return statistics for a rule that takes more than the gradient, and None for others."""
    return PowersOfGradients(rule) if len(rule.degrees) > 1 else None


def compare(rule: Rule, group: Any, dtype: torch.dtype, device: torch.device) -> tuple[float, bool]:
    """Run both backends side by side from the same start.

    Args:
        rule: the update.
        group: its hyper-parameters.
        dtype: type of parameters, gradients and states.
        device: where to run.

    Returns:
        The worst distance of any parameter or state in ulps, and whether the parameters moved
        by more than the tolerance: where they did not, agreement would mean nothing.
    """
    generator = torch.Generator().manual_seed(0)
    kind = type(rule.name, (FusedOptimizer,), {"rule": rule})
    start = [torch.randn(shape, generator=generator).to(device, dtype) for shape in SHAPES]
    runs = []
    for backend in ("triton", "reference"):
        params = [torch.nn.Parameter(x.clone()) for x in start]
        statistics = statistics_for(rule)
        runs.append((params, kind(params, dict(group), backend=backend, statistics=statistics)))
    scales: dict[tuple[int, str], Tensor] = {}
    for params, optimizer in runs:
        _widen(scales, params, optimizer)
    for _ in range(STEPS):
        gradients = [torch.randn(s, generator=generator).to(device, dtype) for s in SHAPES]
        for params, optimizer in runs:
            for p, gradient in zip(params, gradients, strict=True):
                p.grad = gradient
            optimizer.step()
        for params, optimizer in runs:
            _widen(scales, params, optimizer)
    (ours, kernels), (theirs, reference) = runs
    worst, moved = 0.0, False
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        if p.numel() == 0:
            continue
        worst = max(worst, worst_ulps(p, q, scales[i, ""]))
        moved = moved or worst_ulps(p, start[i], scales[i, ""]) > TRAJECTORY[dtype].ulps
        for name, value in kernels.state[p].items():
            worst = max(worst, worst_ulps(value, reference.state[q][name], scales[i, name]))
    return worst, moved


def _widen(
    scales: dict[tuple[int, str], Tensor], params: list[Any], optimizer: FusedOptimizer
) -> None:
    """Keep the largest magnitude that each value has had: rounding errors are of that size."""
    for i, p in enumerate(params):
        for name, value in (("", p), *optimizer.state.get(p, {}).items()):
            magnitude = value.detach().double().abs().cpu()
            previous = scales.get((i, name), magnitude)
            scales[i, name] = torch.maximum(previous, magnitude)


def _print_table(rows: list[dict[str, Any]], device: str) -> None:
    from rich.console import Console
    from rich.table import Table

    name = torch.cuda.get_device_name() if device == "cuda" else "the CPU, in the interpreter"
    table = Table(title=f"kernels against reference on {name}, {STEPS} steps")
    table.add_column("rule")
    table.add_column("type")
    for column in ("option sets", "worst ulps", "tolerance"):
        table.add_column(column, justify="right")
    table.add_column("")
    for row in rows:
        table.add_row(
            row["rule"],
            row["dtype"],
            str(row["groups"]),
            f"{row['worst_ulps']:.3g}",
            f"{row['tolerance_ulps']:g}",
            "ok" if row["passed"] else "FAILED",
        )
    console = Console()
    console.print(table)
    console.print(f"backend: {backends.choose(device)[1]}")


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
