"""What must hold of every pattern that goes through a codec, counted over a share of them.

Errors are counted in units of bit patterns, which are in order within a sign: one is an ulp of
float32, 256 one of 24 bits, 65,536 one of bfloat16. A key that ends in ``wrong`` counts patterns
for which something does not hold; ``worst`` is the largest error found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Counts = dict[str, Any]
# The largest bfloat16, and infinity, as patterns of float32.
LARGEST, INFINITY = 0x7F7F0000, 0x7F800000


def _magnitude(value: Tensor) -> Tensor:
    return value.view(torch.int32) & 0x7FFFFFFF


def _count(wrong: Tensor) -> int:
    return int(wrong.sum())


def _worst(errors: Tensor, among: Tensor) -> int:
    return int(torch.where(among, errors, 0).max())


def _kinds(actual: Tensor, expected: Tensor, name: str) -> Counts:
    """Compare signs, and what is finite, infinite and nan."""
    a, e = _magnitude(actual), _magnitude(expected)
    number = e <= INFINITY
    sign = (actual.view(torch.int32) ^ expected.view(torch.int32)) < 0
    return {
        f"{name}: nan hidden or made, wrong": _count((a > INFINITY) != (e > INFINITY)),
        f"{name}: infinity lost or made, wrong": _count((a == INFINITY) != (e == INFINITY)),
        f"{name}: sign, wrong": _count(sign & number),
    }


def master(
    value: Tensor,
    split: Callable[..., tuple[Tensor, Tensor]],
    join: Callable[..., Tensor],
    remainder: torch.dtype,
    bits: Tensor | None,
) -> Counts:
    """Check a small master on float32 values."""
    parameter, rest = split(value, remainder, bits)
    back, shown = join(parameter, rest), parameter.float()
    magnitude = _magnitude(value)
    finite, top = magnitude < INFINITY, (magnitude >= LARGEST) & (magnitude < INFINITY)
    error = (_magnitude(back) - magnitude).abs()
    apart = (_magnitude(shown) - magnitude).abs()
    again, _ = split(back, remainder, bits)
    changed = again.view(torch.int16) != parameter.view(torch.int16)
    return {
        **_kinds(shown, value, "parameter"),
        **_kinds(back, value, "master"),
        "stored again: parameter, wrong": _count(changed & (magnitude <= INFINITY)),
        "master: not exact": _count((error != 0) & finite),
        "master: error below the largest bfloat16, worst": _worst(error, finite & ~top),
        "master: error from there on, worst": _worst(error, top),
        "parameter: error below the largest bfloat16, worst": _worst(apart, finite & ~top),
        "parameter: error from there on, worst": _worst(apart, top),
    }


def pair(
    parameter: Tensor,
    rest: Tensor,
    split: Callable[[Tensor], tuple[Tensor, Tensor]],
    join: Callable[[Tensor, Tensor], Tensor],
) -> Counts:
    """Check pairs of a parameter and what is kept beside it, whether or not they were ever stored.

    Args:
        parameter: bfloat16 or float16.
        rest: the remainder, or a compensation.
        split: how the value read is stored again.
        join: how it is read.
    """
    value, shown = join(parameter, rest), parameter.float()
    number = ~shown.isnan()
    again, _ = split(value)
    changed = again.view(torch.int16) != parameter.view(torch.int16)
    below = parameter.view(torch.int16) & 0x7FFF
    largest = (below == _largest(parameter.dtype)) & number
    apart = (_magnitude(value) - _magnitude(shown)).abs()
    finite = shown.isfinite()
    return {
        **_kinds(value, shown, "value read"),
        "stored again: parameter, wrong": _count(changed & number),
        "value read: distance from the parameter, worst": _worst(apart, finite & ~largest),
        "value read: distance from the largest parameter, worst": _worst(apart, largest),
    }


def _largest(dtype: torch.dtype) -> int:
    return 0x7F7F if dtype == torch.bfloat16 else 0x7BFF


def compensated(
    value: Tensor,
    split: Callable[..., tuple[Tensor, Tensor]],
    join: Callable[..., Tensor],
    dtype: torch.dtype,
) -> Counts:
    """Check Kahan's compensation on float32 values."""
    parameter, rest = split(value, dtype)
    nearest, back, shown = value.to(dtype), join(parameter, rest), parameter.float()
    cast = parameter.view(torch.int16) == nearest.view(torch.int16)
    again, _ = split(back, dtype)
    changed = again.view(torch.int16) != parameter.view(torch.int16)
    number = ~value.isnan()
    left = torch.where(shown.isfinite(), (back.double() - value).abs(), 0.0)
    before = torch.where(shown.isfinite(), (shown.double() - value).abs(), 0.0)
    # The smallest number of the type, below which nothing can be compensated.
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return {
        **_kinds(back, nearest.float(), "value read"),
        "parameter: not the cast, wrong": _count(~cast & number),
        "stored again: parameter, wrong": _count(changed & number),
        "value read: less than 63 of 64 compensated, wrong": _count(left > before / 64 + least),
        "value read: not exact": _count((left > 0) & value.isfinite()),
    }


def stochastic(
    value: Tensor, bits: Tensor, rounding: Callable[..., Tensor], dtype: torch.dtype
) -> Counts:
    """Check stochastic rounding of float32 values, whatever the random bits."""
    rounded = rounding(value, bits, dtype)
    shown = rounded.float()
    number, finite = ~value.isnan(), value.isfinite()
    nearest = value.to(dtype)
    representable = nearest.float().view(torch.int32) == value.view(torch.int32)
    kept = rounded.view(torch.int16) == nearest.view(torch.int16)
    pattern = rounded.view(torch.int16).int() & 0x7FFF
    size, own = value.abs(), shown.abs()
    above, below = _widened(pattern + 1, dtype), _widened((pattern - 1).clamp(min=0), dtype)
    neighbour = (own == size) | ((own < size) & (size < above)) | ((own > size) & (size > below))
    beyond = size > torch.finfo(dtype).max
    neighbour |= beyond & (pattern == _largest(dtype))
    return {
        **_kinds(shown, value, "rounded"),
        "representable: changed, wrong": _count(representable & number & ~kept),
        "rounded: no neighbour, wrong": _count(finite & ~neighbour),
        "representable": _count(representable & number),
    }


def _widened(pattern: Tensor, dtype: torch.dtype) -> Tensor:
    return pattern.to(torch.int16).view(dtype).float()


def merge(total: Counts, part: Counts) -> None:
    """Add the counts of a share to those of others."""
    for name, value in part.items():
        together = max if name.endswith("worst") else sum
        total[name] = together((total.get(name, 0), value))


def failures(found: Counts, limits: dict[str, int]) -> list[str]:
    """Name what does not hold: a wrong pattern, or an error above its limit."""
    broken = [name for name, value in found.items() if name.endswith("wrong") and value]
    return broken + [name for name, limit in limits.items() if found[name] > limit]
