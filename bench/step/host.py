"""Host time of step(), with the launch itself left out: ``python -m bench.step.host``.

It does not depend on the device, so it is taken on the CPU, in a process of its own: there,
Triton's interpreter has to be on for the Triton backend to take the tensors, and nothing is ever
launched.
Parameters have 16 elements, of which torch's kernels on the CPU make little.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

import fusedopt
from bench.harness import clock
from fusedopt.backends import triton as backend

from . import OURS
from .rules import RULES, Row
from .workload import SAMPLES

ELEMENTS = 16
TENSORS = 1000
COUNTS = (10, 100, 1000, 10_000)


def parameters(count: int, row: Row) -> list[torch.nn.Parameter]:
    """Allocate parameters with gradients, and squares where the rule takes them."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for _ in range(count):
        p = torch.nn.Parameter(torch.randn(ELEMENTS, generator=generator))
        p.grad = torch.randn(ELEMENTS, generator=generator)
        if row.takes_squares:
            p.sum_grad_squared = p.grad.square()
        params.append(p)
    return params


def contenders(count: int, row: Row) -> dict[str, torch.optim.Optimizer]:
    """Return an optimizer for each way that the rule can be stepped."""
    options: dict[str, Any] = {"backend": "triton"}
    if row.takes_squares:
        options["statistics"] = fusedopt.BackpackSquares(batch_size=SAMPLES)
    found = {OURS: row.ours(parameters(count, row), **row.arguments, **options)}
    if row.theirs is not None:
        ways = {"torch-foreach": {"foreach": True}}
        ways |= {"torch-fused": {"fused": True}} if row.fused else {}
        for name, way in ways.items():
            found[name] = row.theirs(parameters(count, row), **row.arguments, **way)
    return found


def stub() -> list[int]:
    """Leave the launch out from now on; return the list to which each adds its programs."""
    calls: list[int] = []

    def record(kernel: Any, programs: int, *_: Any, **__: Any) -> None:
        calls.append(programs)

    backend.launch = record
    return calls


def moving(optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """Return a step that finds the gradients elsewhere each time, as after ``zero_grad()``."""
    params = optimizer.param_groups[0]["params"]
    sets = [[p.grad for p in params], [p.grad.clone() for p in params]]

    def step() -> None:
        sets.reverse()
        for p, gradient in zip(params, sets[0], strict=True):
            p.grad = gradient
        optimizer.step()

    return step


def rows(row: Row, count: int, moved: bool, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Time all ways to step a rule, in turn."""
    calls = stub()
    wanted = settings["contenders"]
    everyone = contenders(count, row)
    optimizers = {n: o for n, o in everyone.items() if not wanted or n == OURS or n in wanted}
    steps = {name: moving(o) if moved else o.step for name, o in optimizers.items()}
    for step in steps.values():
        step()
    calls.clear()
    steps[OURS]()
    launches = len(calls)
    watch = clock.Clock(torch.device("cpu"))
    times = clock.in_turn(steps, watch, settings["rounds"], settings["seconds"])
    summaries = {name: clock.summary(measured) for name, measured in times.items()}
    for name, summary in summaries.items():
        against = {
            f"ratio_to_{key}": summary["median"] / summaries[base]["median"]
            if base in summaries
            else None
            for key, base in (("torch_fused", "torch-fused"), ("ours", OURS))
        }
        yield {
            "rule": row.name,
            "contender": name,
            "tensors": count,
            "gradients": "moved" if moved else "same",
            "microseconds": 1e3 * summary["median"],
            "launches": launches if name == OURS else None,
            **against,
        }


def measure(settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Time every rule at one number of tensors, and AdamW at several."""
    tensors, counts = settings["tensors"], settings["counts"]
    # What holds gradients before each step is timed on the device alone.
    chosen = [row for row in RULES.values() if not row.takes_pairs]
    chosen = [row for row in chosen if not settings["rules"] or row.name in settings["rules"]]
    for row in chosen:
        yield from rows(row, tensors, False, settings)
    row = next((row for row in chosen if row.name == "AdamW"), None)
    if row is not None:
        yield from rows(row, tensors, True, settings)
        for count in counts:
            if count != tensors:
                yield from rows(row, count, False, settings)


def default_settings(quick: bool) -> dict[str, Any]:
    """Return what is measured: tiny where it is to check the benchmark alone."""
    everything: dict[str, Any] = {"rules": [], "contenders": []}
    if quick:
        return {"tensors": 20, "counts": [5], "rounds": 3, "seconds": 0.1, **everything}
    return {
        "tensors": TENSORS,
        "counts": list(COUNTS),
        "rounds": 30,
        "seconds": 0.4,
        **everything,
    }


def main() -> int:
    """Print a line of JSON for each row, as soon as there is one."""
    parser = argparse.ArgumentParser("python -m bench.step.host", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few tensors; no measurement")
    parser.add_argument("--rule", action="append", choices=list(RULES), default=[])
    parser.add_argument("--contender", action="append", default=[], help="besides ours (all)")
    options = parser.parse_args()
    # Other threads would have nothing to do, and are waited for.
    torch.set_num_threads(1)
    chosen = {"rules": options.rule, "contenders": options.contender}
    for row in measure(default_settings(options.quick) | chosen):
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
