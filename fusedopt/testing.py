"""Kernel beside reference: how far they may lie apart, and rules run side by side.

Distances are counted in ulps: units in the last place of the type that a value is *stored* in, at
the size of the largest of the values that it was computed from. A step that cancels most of the old
value is thus measured against what was cancelled, which is where its rounding comes from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .conditioning import reach
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
_QUOTIENT = (
    "those roundings, and a quotient of compiled code: within two units where it is formed, which"
    " are four once it is multiplied"
)
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


# One update of any values, compiled or interpreted.
UPDATE: Mapping[torch.dtype, Tolerance] = {**STEP, torch.float32: Tolerance(8, _QUOTIENT)}

# Elements at most, of those compared, whose results rounding may decide.
UNDECIDED = 0.01

# Where the parameters stand among the values that are compared; the others are states.
PARAMETER = ""


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


class HeldSquares(PowersOfGradients):
    """The same with squares of an earlier step, as ``PerSampleSquares(every=k)`` has them."""

    def inputs(self, parameters: list[Tensor], gradients: list[Tensor], plain: bool) -> RuleInputs:
        """Return gradients and squares, of which none are of this step."""
        return super().inputs(parameters, gradients, plain)._replace(measured=[])


def another(gradient: Tensor, i: int) -> Tensor:
    """Return what input i is if its degree is 1: no two the same, or weights could be exchanged."""
    return gradient * (1 + i)


def statistics_for(rule: Rule) -> Statistics | None:
    """Return statistics for a rule that takes more than the gradient, and None for others."""
    return PowersOfGradients(rule) if len(rule.degrees) > 1 else None


@dataclass(frozen=True)
class Comparison:
    """What was found of a rule with one set of hyper-parameters.

    Attributes:
        ulps: the worst distance of an element after a step from equal values, undecided ones left
            out.
        undecided: how many elements lie further apart than the tolerance, but not further than the
            reference's own results where what it reads moves by a rounding.
        compared: how many elements of parameters and states were compared, at all steps.
        moved: whether a parameter moved by more than the tolerance: where none did, agreement
            would mean nothing.
        tolerance: how many ulps are allowed.
    """

    ulps: float
    undecided: int
    compared: int
    moved: bool
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether kernel and reference agree."""
        few = self.undecided <= UNDECIDED * self.compared
        return self.ulps <= self.tolerance and few


def compare(rule: Rule, group: Any, dtype: torch.dtype, device: torch.device) -> Comparison:
    """Step both backends side by side, each time from the kernels' values.

    Args:
        rule: the update.
        group: its hyper-parameters.
        dtype: type of parameters, gradients and states.
        device: where to run.
    """
    generator = torch.Generator().manual_seed(0)
    kind = type(rule.name, (FusedOptimizer,), {"rule": rule})
    start = [torch.randn(shape, generator=generator).to(device, dtype) for shape in SHAPES]
    runs = []
    for backend in ("triton", "reference"):
        params = [torch.nn.Parameter(x.clone()) for x in start]
        statistics = statistics_for(rule)
        runs.append((params, kind(params, dict(group), backend=backend, statistics=statistics)))
    worst, undecided, compared = 0.0, 0, 0
    old = before = _flat(*runs[0])
    for step in range(1, STEPS + 1):
        gradients = [_gradient(shape, generator).to(device, dtype) for shape in SHAPES]
        for params, optimizer in runs:
            for p, gradient in zip(params, gradients, strict=True):
                p.grad = gradient
            optimizer.step()
        ours, theirs = (_flat(*run) for run in runs)
        gradient = torch.cat([x.reshape(-1) for x in gradients])
        apart, excused = _distances(rule, group, step, before, gradient, ours, theirs)
        for name, values in apart.items():
            worst = max([worst, *values[~excused[name]].tolist()])
            undecided += int(excused[name].sum())
            compared += values.numel()
        _take_over(runs)
        before = ours
    tolerance = UPDATE[dtype].ulps
    moved = worst_ulps(before[PARAMETER], old[PARAMETER], old[PARAMETER]) > tolerance
    return Comparison(worst, undecided, compared, moved, tolerance)


def _gradient(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draw a gradient, in which some elements are zero: what a sign is of them is exact."""
    gradient = torch.randn(shape, generator=generator)
    gradient.view(-1)[7::16] = 0.0
    return gradient


def _distances(
    rule: Rule,
    group: Any,
    step: int,
    before: Mapping[str, Tensor],
    gradient: Tensor,
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the distance of every element after a step, and which may be as large as it is."""
    names = (PARAMETER, *rule.states(group))
    dtype = gradient.dtype
    apart, excused = {}, {}
    reaches: dict[str, Tensor] = {}
    for name, expected in theirs.items():
        a, e = ours[name].double(), expected.double()
        old = before.get(name, torch.zeros_like(expected)).double()
        size = torch.stack([a, e, old, e - old]).abs().nan_to_num(nan=0.0, posinf=0.0).amax(0)
        apart[name] = distance(a, expected, size)
        far = apart[name] > UPDATE[dtype].ulps
        excused[name] = torch.zeros_like(far)
        if name not in names or not far.any():
            continue
        if not reaches:
            compute = compute_dtype([dtype])
            kept = [before.get(n, torch.zeros_like(gradient)).to(compute) for n in names]
            operands = (kept[0], *inputs_of(rule, gradient, compute), *kept[1:])
            # What a rule that counts no steps is told.
            counted = step if rule.counts_steps else min(step, 2)
            found = reach(rule, group, counted, operands, dtype)
            reaches = dict(zip(names, found, strict=True))
        allowed = UPDATE[dtype].ulps * ulp(size, dtype)
        # Not so with a nan.
        excused[name] = far & ((a - e).abs() <= reaches[name] + allowed)
    return apart, excused


def inputs_of(rule: Rule, gradient: Tensor, compute: torch.dtype) -> tuple[Tensor, ...]:
    """Return what a rule reads beside parameter and states, of what ``PowersOfGradients`` gives."""
    square = gradient.to(compute).square()
    return tuple(
        another(gradient, i).to(compute) if degree == 1 else square
        for i, degree in enumerate(rule.degrees)
    )


def _flat(params: list[Any], optimizer: FusedOptimizer) -> dict[str, Tensor]:
    """Copy all parameters behind one another, and all states of each name."""
    found: dict[str, list[Tensor]] = {PARAMETER: []}
    for p in params:
        if p.numel():
            for name, value in ((PARAMETER, p.detach()), *optimizer.state.get(p, {}).items()):
                found.setdefault(name, []).append(value.reshape(-1))
    return {name: torch.cat(values) for name, values in found.items()}


def _take_over(runs: list[tuple[list[Any], FusedOptimizer]]) -> None:
    """Give the reference the values of the kernels, so that each step is judged by itself."""
    (ours, kernels), (theirs, reference) = runs
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            q.copy_(p)
            for name in reference.rule.states(reference.param_groups[0]):
                if name in reference.state[q]:
                    reference.state[q][name].copy_(kernels.state[p][name])
