"""Sums in float32 compared with float64, by the sizes of what was summed."""

from __future__ import annotations

import torch
from torch import Tensor

# Rounding of a sum of some hundred terms, as a share of the sum of their magnitudes.
SUM = 2e-6


def rows_of(terms: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Sum each sample's terms, ``[samples, ...]``, one sample after the other."""
    if offsets is None:
        return torch.stack([sample.sum(0) for sample in terms])
    bounds = offsets.tolist()
    pairs = zip(bounds, bounds[1:], strict=False)
    return torch.stack([terms[start:stop].sum(0) for start, stop in pairs])


def check(
    gradient: Tensor, squares: Tensor, rows: Tensor, sizes: Tensor, before: Tensor | None = None
) -> None:
    """Compare with float64 rows ``[samples, ...]``.

    Args:
        gradient: should be the sum of rows.
        squares: should be the sum of squared rows, and ``before``.
        rows: each sample's contribution.
        sizes: what the rows would be if every term were positive.
        before: what was accumulated into.
    """
    expected, size = rows.sum(0), sizes.sum(0)
    error = (gradient.double() - expected).abs()
    bound = SUM * size + torch.finfo(gradient.dtype).eps * expected.abs()
    assert error.le(bound).all(), f"gradient: {gradient}\nexpected: {expected}"
    expected, size = rows.square().sum(0), sizes.square().sum(0)
    if before is not None:
        expected, size = expected + before, size + before.abs()
    assert squares.dtype == torch.float32
    error = (squares.double() - expected).abs()
    assert error.le(2 * SUM * size).all(), f"squares: {squares}\nexpected: {expected}"
