"""How far kernel and reference may lie apart: one table, and the measure it is stated in.

Distances are counted in ulps: units in the last place of the type that a value is *stored* in, at
the size of the largest of the values that it was computed from. A step that cancels most of the old
value is thus measured against what was cancelled, which is where its rounding comes from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


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
