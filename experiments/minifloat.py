"""Small floating-point codes relative to a group's largest magnitude, in exact operations only.

Every operation is an integer one, a correctly rounded division or product in float32, or a product
by a power of two: a kernel and PyTorch that follow these lines agree to the bit.

    encode   a = max |x| of the group; nan where it is not finite; 0: all codes are 0
             y = |x| / a                      correctly rounded, in [0, 1]
             z = y top                        the largest code stands for 1
             w = bits(z) - K                  where z is normal: exponent and mantissa
                 int(z 2^(2^E + 21))          where it is not
             q = (w + r) >> (23 - M)          r = 2^(22 - M) to nearest, else of r's 23 - M bits
             q = max(q, 1)                    of v, where x > 0
    decode   t = float32 with the bits q << (23 - M) + K, or q 2^(2 - 2^E - M) where q < 2^M
             x = a (t inverse)                at least the smallest subnormal number where v's q > 0

K = (128 - 2^E) << 23, top = 2 - 2^-M (1.75 for e4m3, whose last code is its nan), and
inverse = 1 / top in float32, for which top inverse = 1 exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST = 2.0**-149


@dataclass(frozen=True)
class Minifloat:
    """A code of exponent and mantissa bits, with a sign bit where ``signed``.

    Attributes:
        exponent: E, its bits; the lowest exponent is that of subnormal codes.
        mantissa: M, its bits.
        signed: whether codes have a sign; without it they are of v, and v > 0 has a code > 0.
        unused: how many codes at the top stand for no number.
    """

    exponent: int
    mantissa: int
    signed: bool
    unused: int = 0

    @property
    def largest(self) -> int:
        """The code of 1."""
        return 2 ** (self.exponent + self.mantissa) - 1 - self.unused

    @property
    def top(self) -> float:
        """What the code of 1 would stand for in units of its binade."""
        return 2.0 - (1 + self.unused) * 2.0**-self.mantissa

    @property
    def cut(self) -> int:
        """Bits of a float32 mantissa that are rounded off."""
        return 23 - self.mantissa

    @property
    def bias(self) -> int:
        """K, what the bits of the smallest normal code lack."""
        return (128 - 2**self.exponent) << 23

    def threshold(self, random: Tensor) -> Tensor:
        """Return r of 32 bits that are evenly spread."""
        return random >> (32 - self.cut)

    def encode(self, x: Tensor, remainder: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return codes, int64 [groups, elements], with their sign, and scales, float32 [groups, 1].

        Args:
            x: float32 [groups, elements of a group].
            remainder: r, in [0, 2^cut), elementwise; None: to nearest.
        """
        a = x.abs().amax(1, keepdim=True)
        finite = a.isfinite()
        a = torch.where(finite, a, torch.nan)
        y = torch.where(finite & (a > 0), x.abs() / a, 0.0)
        z = y * torch.tensor(self.top, dtype=torch.float32)
        bits = z.view(torch.int32).long() - self.bias
        low = (z * 2.0 ** (2**self.exponent + 21)).clamp(max=2.0**24).long()
        w = torch.where(z < 2.0 ** (2 - 2**self.exponent), low, bits)
        r = 1 << (self.cut - 1) if remainder is None else remainder
        # A remainder never takes the largest number above its code: its bits there are 0.
        q = (w + r) >> self.cut
        if self.signed:
            return torch.where(x < 0, -q, q), a
        return torch.where(finite & (x > 0), q.clamp(min=1), q), a

    def decode(self, codes: Tensor, a: Tensor) -> Tensor:
        """Return float32 values of codes [groups, elements] and scales [groups, 1]."""
        q = codes.abs()
        normal = ((q << self.cut) + self.bias).int().view(torch.float32)
        low = q.float() * 2.0 ** (2 - 2**self.exponent - self.mantissa)
        t = torch.where(q >= 2**self.mantissa, normal, low)
        x = a * (t * (1.0 / torch.tensor(self.top, dtype=torch.float32)))
        if self.signed:
            return torch.where(codes < 0, -x, x)
        return torch.where((q > 0) & (x < SMALLEST), SMALLEST, x)
