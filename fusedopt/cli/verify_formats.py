"""How parameters and states are kept, by kernels and by the reference: for ``verify``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fusedopt.kernels.lang import jit, tl
from fusedopt.kernels.rule import Group, Rule
from fusedopt.kernels.rules import ADAM
from fusedopt.optimizer import FusedOptimizer
from fusedopt.testing import TRAJECTORY, worst_ulps

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# Type of parameters and gradients, and options of precision.
FORMATS: Mapping[str, tuple[torch.dtype, dict[str, Any]]] = {
    "bf16 states": (FP32, {"state_dtype": BF16}),
    "fp32 states": (BF16, {"state_dtype": FP32}),
    "stochastic": (BF16, {"rounding": "stochastic"}),
    "stochastic, fp16": (FP16, {"rounding": "stochastic"}),
    "kahan": (BF16, {"rounding": "kahan"}),
    "kahan, fp16": (FP16, {"rounding": "kahan"}),
    "remainder": (BF16, {"master": "remainder"}),
    "remainder8": (BF16, {"master": "remainder8"}),
    "remainder8, stochastic": (BF16, {"master": "remainder8", "rounding": "stochastic"}),
    "float32": (BF16, {"master": "float32"}),
    "int8": (FP32, {"state_dtype": "int8"}),
    "fp8": (BF16, {"state_dtype": "fp8"}),
    "stochastic + int8": (BF16, {"rounding": "stochastic", "state_dtype": "int8"}),
    "remainder8 + int8": (BF16, {"master": "remainder8", "state_dtype": "int8"}),
    "bf16 and int8": (BF16, {"state_dtype": {"exp_avg": BF16, "exp_avg_sq": "int8"}}),
}
# Whole chunks and ragged ones, rows that end within a group, scalars, and none at all.
SHAPES = ((1024,), (1300,), (3, 150), (), (0,), (1,))
STEPS = 2


@jit
def _hold(p, inputs, states, coefficients, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    fresh = coefficients[0] > 0.5
    value = inputs[0]
    magnitude = tl.abs(value)
    return tl.where(fresh, value, p), (
        tl.where(fresh, value, states[0]),
        tl.where(fresh, magnitude, states[1]),
    )


def _hold_twin(
    p: Tensor,
    inputs: tuple[Tensor, ...],
    states: tuple[Tensor, ...],
    coefficients: tuple[Any, ...],
    options: tuple[bool, ...],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    if not coefficients[0] > 0.5:
        return p, states
    value = inputs[0].to(p.dtype)
    return value.clone(), (value.clone(), value.abs())


# Keeps the gradient at odd steps, and what it has read at even ones: without arithmetic, in which
# kernel and reference may differ by a rounding.
HOLD = Rule(
    name="hold",
    update=_hold,
    twin=_hold_twin,
    coefficients=lambda group, step: (step % 2,),
    coefficient_names=("fresh",),
    states=ADAM.states,
    nonnegative=ADAM.nonnegative,
    hyper=(),
)


def compare_all(device: torch.device) -> Iterator[dict[str, Any]]:
    """Step by kernels and by the reference, with every format.

    Yields:
        A row for the table: ``differing``, how many elements of what is kept of given values differ
        in a bit; ``worst_ulps``, the largest distance of a parameter after a step of Adam's from
        equal values.
    """
    for name, (dtype, options) in FORMATS.items():
        differing = _differing(dtype, options, device)
        worst = _worst(dtype, options, device)
        tolerance = TRAJECTORY[dtype].ulps
        yield {
            "format": name,
            "dtype": str(dtype).removeprefix("torch."),
            "differing": differing,
            "worst_ulps": worst,
            "tolerance_ulps": tolerance,
            "passed": differing == 0 and worst <= tolerance,
        }


def _differing(dtype: torch.dtype, options: dict[str, Any], device: torch.device) -> int:
    runs = _runs(HOLD, {"lr": 1.0, "amsgrad": False}, options, dtype, device)
    count = 0
    for gradients in _gradients(dtype, device, extreme=True):
        _step(runs, gradients)
        for ours, theirs in _pairs(runs):
            count += int((_bits(ours) != _bits(theirs)).sum())
    return count


def _worst(dtype: torch.dtype, options: dict[str, Any], device: torch.device) -> float:
    runs = _runs(ADAM, ADAM.example_groups[0], options, dtype, device)
    worst = 0.0
    for gradients in _gradients(dtype, device, extreme=False):
        before = [p.detach().clone() for p in runs[0][0]]
        _step(runs, gradients)
        for p, q, old in zip(runs[0][0], runs[1][0], before, strict=True):
            worst = max(worst, worst_ulps(p, q, old))
        # From equal values again: a code that has flipped is no error of the next update.
        for ours, theirs in _pairs(runs):
            theirs.copy_(ours)
    return worst


def _runs(
    rule: Rule, group: Group, options: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> list[tuple[list[Any], FusedOptimizer]]:
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(shape, generator=generator).to(device, dtype) for shape in SHAPES]
    kind = type(rule.name, (FusedOptimizer,), {"rule": rule})
    runs = []
    for backend in ("triton", "reference"):
        params = [nn.Parameter(x.clone()) for x in start]
        runs.append((params, kind(params, dict(group), backend=backend, **options)))
    return runs


def _gradients(dtype: torch.dtype, device: torch.device, extreme: bool) -> Iterator[list[Tensor]]:
    generator = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        found = []
        for shape in SHAPES:
            x = torch.randn(shape, generator=generator)
            if extreme:
                # Over many octaves, with zeros, and a nan in the longest.
                x = x * 2.0 ** torch.randint(-20, 12, shape, generator=generator)
                x = torch.where(torch.rand(shape, generator=generator) < 0.05, 0.0, x)
            if extreme and x.numel() == 1300:
                x[1100] = torch.nan
            found.append(x.to(device, dtype))
        yield found


def _step(runs: list[tuple[list[Any], FusedOptimizer]], gradients: list[Tensor]) -> None:
    for params, optimizer in runs:
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient
        optimizer.step()


def _pairs(runs: list[tuple[list[Any], FusedOptimizer]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each tensor of the kernels' run with that of the reference's."""
    (ours, kernels), (theirs, reference) = runs
    for p, q in zip(ours, theirs, strict=True):
        yield p.detach(), q.detach()
        for name, value in kernels.state[p].items():
            yield value, reference.state[q][name]


def _bits(x: Tensor) -> Tensor:
    """Return the patterns of a tensor, in which any nan is one."""
    size = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    if x.dtype.is_floating_point and x.element_size() > 1:
        x = torch.where(x.isnan(), torch.nan, x)
    return x.view(size)
