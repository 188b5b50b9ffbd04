"""Distances in units in the last place, the measure that tolerances are stated in."""

from __future__ import annotations

import torch
from torch import Tensor


def ulps(actual: Tensor, expected: Tensor, scale: Tensor) -> float:
    """Largest distance between two tensors, in ulps of their type.

    Args:
        actual: values of a floating type.
        expected: values of the same shape, of any floating type.
        scale: what the values were computed from, such as their values before the step. Where
            terms cancel, the result is small but its rounding error is that of the terms; an
            ulp is therefore taken at the largest of the three magnitudes.

    Returns:
        The distance; inf where one value is finite and the other is not. Two nans are equal.
    """
    dtype = actual.dtype
    a, b = actual.detach().double().cpu(), expected.detach().double().cpu()
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return 0.0
    largest = torch.maximum(torch.maximum(a.abs(), b.abs()), scale.detach().double().cpu().abs())
    distance = (a - b).abs() / spacing(largest, dtype)
    distance = torch.where(distance.isnan(), torch.inf, distance)
    return float(torch.where(same, 0.0, distance).max())


def spacing(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance of neighbouring numbers of a type at the given magnitudes (float64)."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(magnitude.clamp(min=info.smallest_normal))[1] - 1
    return torch.ldexp(torch.full_like(magnitude, info.eps), exponent)
