"""The power code in operations that a kernel and PyTorch do identically, with no root in them.

The bits of a float32, read as an integer, are its logarithm but for a piecewise linear error. A
multiple K of that integer is therefore nearly the K-th power, and what an integer division by K
undoes exactly:

    level(q) = float32 with the bits  K (bits(q) - bits(N)) + bits(1.0),   level(0) = 0

for codes q = 1 ... N. Levels rise strictly, level(N) = 1. With x of a group:

    encode   a = max |x|; nan where it is not finite; 0: all codes are 0
             y = |x| / a                            correctly rounded, in [0, 1]
             i = bits(y) - bits(level(1))
             q = int(float32 with the bits  bits(1.0) + i // K)   where i >= 0, else 0
                 now level(q) <= y < level(q + 1), exactly
             q = q + 1 where y - level(q) > phi (level(q + 1) - level(q))
                 phi = 1/2 to nearest; else 24 bits as a fraction: unbiased over phi
             q = max(q, 1)                          of v, where x > 0
    decode   x = a level(q)                         at least 2^-149 where v's q > 0

No product is added to anything, so that no compiler can contract.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .minifloat import SMALLEST

ONE = 0x3F800000


def bits(x: Tensor) -> Tensor:
    """Return the patterns of float32 numbers, int64."""
    return x.view(torch.int32).long()


def number(patterns: Tensor) -> Tensor:
    """Return the float32 numbers of patterns."""
    return patterns.int().view(torch.float32)


@dataclass(frozen=True)
class BitPower:
    """A power code.

    Attributes:
        power: K.
        largest: N, the code of 1.
        signed: whether codes have a sign; without it they are of v, and v > 0 has a code > 0.
    """

    power: int
    largest: int
    signed: bool

    def levels(self, q: Tensor) -> Tensor:
        """Return the levels of codes from 0 to N + 1, float32."""
        top = bits(torch.tensor(float(self.largest)))
        patterns = self.power * (bits(q.float()) - top) + ONE
        return torch.where(q > 0, number(patterns.clamp(min=0)), 0.0)

    def threshold(self, random: Tensor) -> Tensor:
        """Return phi of 32 bits that are evenly spread."""
        return (random >> 8).float() * 2.0**-24

    def encode(self, x: Tensor, phi: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return codes, int64 [groups, elements], with their sign, and scales, float32 [groups, 1].

        Args:
            x: float32 [groups, elements of a group].
            phi: float32 in [0, 1), elementwise: thresholds as fractions of the gap between levels;
                None: to nearest.
        """
        a = x.abs().amax(1, keepdim=True)
        finite = a.isfinite()
        a = torch.where(finite, a, torch.nan)
        y = torch.where(finite & (a > 0), x.abs() / a, 0.0)
        i = bits(y) - bits(self.levels(torch.tensor(1)))
        low = torch.where(i >= 0, number(ONE + i.clamp(min=0) // self.power).long(), 0)
        below, above = self.levels(low), self.levels(low + 1)
        q = low + (y - below > (0.5 if phi is None else phi) * (above - below))
        if self.signed:
            return torch.where(x < 0, -q, q), a
        return torch.where(finite & (x > 0), q.clamp(min=1), q), a

    def decode(self, codes: Tensor, a: Tensor) -> Tensor:
        """Return float32 values of codes [groups, elements] and scales [groups, 1]."""
        x = a * self.levels(codes.abs())
        if self.signed:
            return torch.where(codes < 0, -x, x)
        return torch.where((codes > 0) & (x < SMALLEST), SMALLEST, x)
