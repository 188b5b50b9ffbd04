"""One small step of every rule, for a tool that watches memory: ``python -m bench.gpu.small_step``.

Tensors end in the middle of a chunk, and half of them start off a 16-byte boundary; each is the end
of its allocation. The results are compared with the reference backend on the CPU, so that a tool
that has nothing to report has watched kernels that do something.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedopt import FusedOptimizer, GlobalNorm, Rule
from fusedopt.cli import verify_samples
from fusedopt.kernels import lang
from fusedopt.kernels.rules import REGISTRY
from fusedopt.testing import TRAJECTORY, statistics_for, worst_ulps

PARTS = ("first", "rules", "samples")
STEPS = 2
# Whole chunks, a chunk and a part, and less than one.
SIZES = (2048, 1031, 5)
DTYPES = (torch.float32, torch.bfloat16)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print what differs and how much was compared.

    Returns:
        0, or 1 where something differs, or 2 where the device is not there.
    """
    parser = argparse.ArgumentParser("python -m bench.gpu.small_step", description=__doc__)
    parser.add_argument("parts", nargs="*", help=" or ".join(PARTS) + " (both)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args(arguments)
    for part in options.parts:
        if part not in PARTS:
            parser.error(f"no part {part!r}: there are {' and '.join(PARTS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("small_step: torch finds no GPU; --device cpu runs the interpreter", file=sys.stderr)
        return 2
    if lang.INTERPRETED != (options.device == "cpu"):
        # The kernels were made for the other mode when Triton's decorator ran.
        interpreter = {"TRITON_INTERPRET": str(int(options.device == "cpu"))}
        command = [sys.executable, "-m", "bench.gpu.small_step", "--device", options.device]
        return subprocess.run(
            [*command, *options.parts], env={**os.environ, **interpreter}, check=False
        ).returncode
    return run(torch.device(options.device), options.parts or PARTS)


def run(device: torch.device, parts: Sequence[str] = PARTS) -> int:
    """Compare, and return the exit status."""
    compared, failed = 0, 0
    for what, passed in _comparisons(device, parts):
        compared += 1
        failed += not passed
        if not passed:
            print(f"FAILED: {what}")
    print(f"{compared} comparisons with the reference, {failed} failed")
    return 1 if failed or not compared else 0


def _comparisons(device: torch.device, parts: Sequence[str]) -> Iterator[tuple[str, bool]]:
    if "rules" in parts or "first" in parts:
        for rule in REGISTRY.values() if "rules" in parts else [REGISTRY["Adam"]]:
            # That with the most states: the most addresses.
            group = max(rule.example_groups, key=lambda group: len(rule.states(group)))
            for dtype in DTYPES:
                worst, moved = compare(rule, group, dtype, device)
                passed = moved and worst <= TRAJECTORY[dtype].ulps
                yield f"{rule.name} {dtype}: {worst:.3g} ulps, moved: {moved}", passed
    if "samples" in parts:
        for row in verify_samples.compare_all(device):
            yield f"{row['operation']} {row['dtype']}: {row['worst']:.2g}", row["passed"]


def compare(
    rule: Rule, group: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> tuple[float, bool]:
    """Step by kernels on the device and by the reference on the CPU, from the same start.

    Returns:
        The worst ``distance`` of a parameter or state, and whether all parameters moved.
    """
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(n, generator=generator).to(dtype) for n in SIZES for _ in range(2)]
    kind = type(rule.name, (FusedOptimizer,), {"rule": rule})
    # Each form of the norm in one type, and a bound that is reached.
    norm_type = 2.0 if dtype == torch.float32 else float("inf")
    runs = []
    for backend, where in (("triton", device), ("reference", torch.device("cpu"))):
        params = [torch.nn.Parameter(placed(x, where, i % 2)) for i, x in enumerate(starts)]
        clip = GlobalNorm(1.0, norm_type=norm_type)
        statistics = statistics_for(rule)
        optimizer = kind(params, dict(group), backend=backend, clip=clip, statistics=statistics)
        runs.append((params, optimizer, where))
    for _ in range(STEPS):
        gradients = [torch.randn(x.shape, generator=generator).to(dtype) for x in starts]
        for params, optimizer, where in runs:
            for p, gradient in zip(params, gradients, strict=True):
                p.grad = placed(gradient, where, p.storage_offset())
            optimizer.step()
    (ours, kernels, _), (theirs, reference, _) = runs
    worst, moved = 0.0, True
    for p, q, start in zip(ours, theirs, starts, strict=True):
        moved = moved and not torch.equal(p.detach().cpu(), start)
        worst = max(worst, distance(p.detach(), q.detach()))
        for name, value in kernels.state[p].items():
            worst = max(worst, distance(value, reference.state[q][name]))
    return worst, moved


def distance(actual: Tensor, expected: Tensor) -> float:
    """Return the largest distance in ulps of the largest element.

    Elements in which terms have cancelled each other carry the rounding of those terms.
    """
    largest = expected.double().abs().max()
    return worst_ulps(actual.cpu(), expected, largest.expand(expected.shape))


def placed(values: Tensor, device: torch.device, shift: int) -> Tensor:
    """Copy values into the end of a new allocation, ``shift`` elements behind its start."""
    memory = torch.empty(shift + values.numel(), dtype=values.dtype, device=device)
    memory[shift:] = values.to(device)
    return memory[shift:]


if __name__ == "__main__":
    sys.exit(main())
