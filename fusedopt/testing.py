"""Kernel beside reference: how far they may lie apart, and rules run side by side.

Distances are counted in ulps: units in the last place of the type that a value is *stored* in, at
the size of the largest of the values that it was computed from. A step that cancels most of the old
value is thus measured against what was cancelled, which is where its rounding comes from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .kernels.rule import Rule
from .memory.dtypes import compute_dtype
from .optimizer import FusedOptimizer
from .source import RuleInputs
from .statistics import Statistics

STEPS = 5

# Whole chunks, ragged ones, scalars, and none at all.
SHAPES = ((1024,), (2500,), (3, 5, 7), (), (0,), (1,))


@dataclass(frozen=True)
class Tolerance:
    """A bound in ulps of the stored type, and what makes it necessary."""

    ulps: float
    reason: str


_ORDER = "up to six roundings between memory and memory, which kernel and twin order apart"
_FLIP = "a last-bit difference of the arithmetic can turn one rounding on storing"
_GROWTH = "differences of single steps add up: momentum 0.9 remembers ten, a parameter all of them"
_FLIPS = "a turned rounding shifts what follows, and some elements meet two or three of them"

# One update from equal values.
STEP: Mapping[torch.dtype, Tolerance] = {
    torch.float32: Tolerance(4, _ORDER),
    torch.float64: Tolerance(4, _ORDER),
    torch.bfloat16: Tolerance(1, _FLIP),
    torch.float16: Tolerance(1, _FLIP),
}

# Thirty updates of one run against thirty of another.
TRAJECTORY: Mapping[torch.dtype, Tolerance] = {
    torch.float32: Tolerance(24, _GROWTH),
    torch.float64: Tolerance(24, _GROWTH),
    torch.bfloat16: Tolerance(4, _FLIPS),
    torch.float16: Tolerance(4, _FLIPS),
}


def ulp(size: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance between neighbouring values of ``dtype`` at magnitudes of float64 ``size``."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(size.clamp(min=info.tiny)).exponent - 1
    return torch.ldexp(torch.full_like(size, info.eps), exponent)


def distance(actual: Tensor, expected: Tensor, scale: Tensor) -> Tensor:
    """Elementwise distance in ulps of the type of ``expected`` at magnitude ``scale``.

    Equal infinities, and two nans, are 0 apart; a finite and an infinite or nan value, infinity.
    """
    a, e = actual.double(), expected.double()
    alike = (a == e) | (a.isnan() & e.isnan())
    apart = (a - e).abs() / ulp(scale, expected.dtype)
    return torch.where(alike, 0.0, apart.nan_to_num(nan=torch.inf, posinf=torch.inf))


def worst_ulps(actual: Tensor, expected: Tensor, scale: Tensor) -> float:
    """Return the largest distance in ulps, at the largest magnitude of the three; 0 if empty.

    Args:
        actual: values of a floating type, on any device.
        expected: of the same shape and type.
        scale: what the values were computed from, such as their values before the step.
    """
    if actual.numel() == 0:
        return 0.0
    a, e, s = (t.detach().cpu().double() for t in (actual, expected, scale))
    sizes = [t.abs().nan_to_num(nan=0.0, posinf=0.0) for t in (a, e, s)]
    size = torch.maximum(torch.maximum(sizes[0], sizes[1]), sizes[2])
    return float(distance(a, e.to(expected.dtype), size).max())


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
