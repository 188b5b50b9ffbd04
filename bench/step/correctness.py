"""Whether a contender does what its name says: two steps, compared with float64.

The reference is torch's for-loop in float64 on the same elements; for the rules that torch has not,
the update's PyTorch twin in float64, which the test suite compares with vectors computed by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bench.harness.contenders import Mismatch
from fusedopt import SVAG, BackpackSquares
from fusedopt.testing import ulp

from .workload import SAMPLES, Workload

# Deviations of the gradients of two steps, and the bound on their norm over the root of the number
# of elements. The first is not clipped and the second is: an update that does not change with the
# gradient's scale, as Adam's does not, then shows whether it was.
DEVIATIONS = (0.5, 1.5)
CLIP = 0.75
# Powers of two: a division by it rounds nothing.
SCALE = 1024.0


@dataclass(frozen=True)
class Error:
    """The largest distance from float64.

    Attributes:
        ulps: of the stored type, at the largest magnitude that the element had.
        relative: over that magnitude.
        bound_ulps: what it may be.
    """

    ulps: float
    relative: float
    bound_ulps: float

    def facts(self) -> dict[str, float]:
        """Return plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Expected:
    """The elements that are checked, in float64.

    Attributes:
        start: before the first step.
        end: after the second.
        size: the largest magnitude that each had; what is stored is rounded in units of that.
    """

    start: Tensor
    end: Tensor
    size: Tensor


@dataclass(frozen=True)
class Taken:
    """What two steps have made.

    Attributes:
        end: the elements that are checked, after the second.
        still: how many runs of elements have not moved.
    """

    end: Tensor
    still: int


def max_norm(workload: Workload) -> float:
    """Return the bound on the gradient norm, about half of the second step's."""
    return float(CLIP * workload.case.parameters**0.5)


def expect(workload: Workload, clip: bool) -> Expected:
    """Take both steps in float64.

    Raises:
        Mismatch: where the steps are too small to be told from none.
    """
    workload.restart()
    start = workload.checked(workload.parameters)
    size = start.abs()
    p = torch.nn.Parameter(start.clone())
    optimizer = _reference(p, workload)
    pair = None if workload.row.ell is None else SVAG(optimizer, workload.row.ell)
    for seed, deviation in enumerate(DEVIATIONS, 1):
        workload.new_gradients(seed, deviation)
        factor = 1.0
        if clip:
            factor = min(1.0, max_norm(workload) / (workload.gradient_norm() + 1e-6))
        if pair is not None:
            p.grad = workload.checked(workload.held)
            pair.hold()
        p.grad = workload.checked(workload.gradients).mul_(factor)
        if workload.squares is not None:
            p.sum_grad_squared = workload.checked(workload.squares).mul_(factor**2)
        optimizer.step()
        size = torch.maximum(size, p.detach().abs())
    expected = Expected(start, p.detach(), size)
    moved = _distances(start, expected, workload.codec.param)[0].median()
    if not moved > 1.5 * workload.codec.bound:
        raise Mismatch(f"two steps move most elements by {moved:.3g} ulps: nothing could be told")
    return expected


def _reference(p: Tensor, workload: Workload) -> torch.optim.Optimizer:
    row = workload.row
    if row.theirs is not None:
        return row.theirs([p], **row.arguments, foreach=False)
    options = {"statistics": BackpackSquares(batch_size=SAMPLES)} if row.takes_squares else {}
    return row.ours([p], **row.arguments, backend="reference", **options)


def check(
    workload: Workload,
    expected: Expected,
    step: Callable[[], Any],
    bound: float,
    scale: float = 1.0,
) -> Error:
    """Take two steps and return how far they lead from float64.

    Args:
        workload: whose tensors ``step`` updates.
        expected: of this workload.
        step: of a contender without history.
        bound: ulps that an element may be off.
        scale: the loss scale that it divides out.

    Raises:
        Mismatch: where an element is further off than the bound, or a run of elements has
            not moved at all.
    """
    return compare(workload, take(workload, step, scale), expected, bound)


def take(workload: Workload, step: Callable[[], Any], scale: float = 1.0) -> Taken:
    """Take the two steps.

    Args:
        workload, step, scale: as for ``check``.

    Raises:
        Mismatch: where a step takes gradients away.
    """
    workload.restart()
    for seed, deviation in enumerate(DEVIATIONS, 1):
        workload.new_gradients(seed, deviation * scale)
        step()
        if not workload.keeps_gradients():
            raise Mismatch("the step takes gradients away: the next one would do nothing")
    return Taken(workload.checked(workload.parameters), workload.still())


def compare(workload: Workload, taken: Taken, expected: Expected, bound: float) -> Error:
    """Return how far two steps have led from float64.

    Args:
        workload, expected, bound: as for ``check``.
        taken: of this workload.

    Raises:
        Mismatch: where an element is further off than the bound, or a run of elements has
            not moved at all.
    """
    dtype = workload.codec.param
    ulps, relative = (x.max().item() for x in _distances(taken.end, expected, dtype))
    error = Error(ulps, relative, bound)
    # Not the other way round, for which nan would pass.
    if not ulps <= error.bound_ulps:
        raise Mismatch(
            f"a parameter is {ulps:.3g} ulps (relative {relative:.2g}) from float64 after two"
            f" steps, at most {error.bound_ulps:g}",
            error,
        )
    if taken.still:
        raise Mismatch(f"{taken.still} runs of elements have not moved at all", error)
    return error


def _distances(found: Tensor, expected: Expected, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return elementwise distances from what is expected: in ulps, and relative."""
    size = torch.maximum(expected.size, found.abs().nan_to_num(nan=0.0, posinf=0.0))
    difference = (found - expected.end).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    return difference / ulp(size, dtype), difference / size.clamp(min=torch.finfo(dtype).tiny)
