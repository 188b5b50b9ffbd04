"""AdamW in every format, and with what rides along, beside a copy of as many bytes.

``python -m bench.gpu.formats --out FILE`` steps one tensor of bfloat16 parameters in turn with the
copy, one read and one write; the aim is 90 % of the copy's bandwidth. The file is written anew
after each format, so that what was measured is there when time runs out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import fusedopt
from bench.harness import clock
from bench.harness.output import write_json
from fusedopt.formats import footprint
from fusedopt.kernels import telemetry

ELEMENTS = 2**30
AIM = 0.9
DTYPE = torch.bfloat16

# Options of precision, those first that are wanted most.
FORMATS: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "remainder8 + int8": {"master": "remainder8", "state_dtype": "int8"},
    "remainder8, stochastic + int8": {
        "master": "remainder8",
        "rounding": "stochastic",
        "state_dtype": "int8",
    },
    "stochastic + int8": {"rounding": "stochastic", "state_dtype": "int8"},
    "remainder8 + fp8": {"master": "remainder8", "state_dtype": "fp8"},
    "stochastic": {"rounding": "stochastic"},
    "remainder8": {"master": "remainder8"},
    "int8": {"state_dtype": "int8"},
    "fp8": {"state_dtype": "fp8"},
    "float16": {"state_dtype": torch.float16},
    "bf16 and int8": {"state_dtype": {"exp_avg": DTYPE, "exp_avg_sq": "int8"}},
    "remainder": {"master": "remainder"},
    "kahan": {"rounding": "kahan"},
    "float32": {"master": "float32", "state_dtype": torch.float32},
}
# What rides along, beside "plain": each optimizer has its own.
RIDING: Mapping[str, Callable[[], dict[str, Any]]] = {
    "telemetry": lambda: {"telemetry": fusedopt.Telemetry()},
    "average": lambda: {"average": fusedopt.WeightAverage()},
}
NAMES = ("plain", *RIDING, *(name for name in FORMATS if name != "plain"))


def options_of(name: str) -> Mapping[str, Any]:
    """Return the options of an optimizer that is measured."""
    return RIDING[name]() if name in RIDING else FORMATS[name]


def measure(
    options: Mapping[str, Any], elements: int, device: torch.device, rounds: int, seconds: float
) -> dict[str, Any]:
    """Time steps and copies in turn.

    Returns:
        ``bytes`` moved a parameter; ``gbps`` of the steps and ``copy_gbps``, percentiles each; and
        ``of_copy``, the share.
    """
    p = torch.nn.Parameter(torch.ones(elements, dtype=DTYPE, device=device))
    p.grad = torch.full_like(p, 0.5)
    optimizer = fusedopt.AdamW([p], lr=1e-3, backend="triton", **options)
    group = optimizer.param_groups[0]
    parts = footprint.of_element(optimizer.rule, group, DTYPE, DTYPE)
    moved = footprint.total(parts)[1]
    if optimizer.telemetry is not None:
        moved += 4 * telemetry.COUNT / telemetry.SMALLEST_BLOCK
    source = torch.zeros(round(moved * elements / 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    # Compiled, and states made.
    optimizer.step()
    functions: dict[str, Callable[[], object]] = {
        "step": optimizer.step,
        "copy": lambda: target.copy_(source),
    }
    times = clock.in_turn(functions, clock.Clock(device), rounds, seconds)
    speeds = {
        name: clock.percentiles([moved * elements / (1e6 * on_device) for on_device, _ in own])
        for name, own in times.items()
    }
    share = speeds["step"]["median"] / speeds["copy"]["median"]
    return {
        "bytes": moved, "gbps": speeds["step"], "copy_gbps": speeds["copy"], "of_copy": share,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser("python -m bench.gpu.formats", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--elements", type=int, default=ELEMENTS)
    parser.add_argument("--format", action="append", choices=NAMES, help="repeatable (all)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.elements < 1:
        parser.error(f"--elements {options.elements}: at least 1")
    device = torch.device(options.device)
    found: dict[str, Any] = {}
    for name in options.format or NAMES:
        found[name] = measure(options_of(name), options.elements, device, options.rounds, 1.0)
        clock.release()
        write_json(options.out, {"elements": options.elements, "aim": AIM, "formats": found})
        print(json.dumps({name: found[name]["of_copy"]}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
