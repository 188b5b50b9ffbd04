"""The PyTorch twin of ``kernels/codecs/masters.py``: a float32 master in one or two bytes more.

What is exact, and what holds of values that were never stored, is said there.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Magnitudes as bit patterns: the largest bfloat16, and infinity.
LARGEST = 0x7F7F0000
INFINITY = 0x7F800000

REMAINDERS = (torch.int16, torch.int8)


def split(
    value: Tensor, remainder: torch.dtype, bits: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Split float32 values into what is kept of them.

    Args:
        value: float32, of any shape.
        remainder: ``torch.int16`` or ``torch.int8``.
        bits: int32 of the same shape, 32 random bits each, of which an 8-bit remainder takes the
            upper 8 to round stochastically; None to round to nearest, ties to even.

    Returns:
        The parameter (bfloat16) and the remainder, of the shape of ``value``.
    """
    pattern = value.view(torch.int32)
    magnitude = pattern & 0x7FFFFFFF
    no_carry = magnitude >= LARGEST
    cut = pattern >> 16
    cut = torch.where(magnitude > INFINITY, cut | 0x40, cut)
    rounded = pattern
    if remainder == torch.int8:
        noise = ((pattern >> 8) & 1) + 0x7F if bits is None else (bits >> 24) & 0xFF
        rounded = pattern + noise
    dropped = 16 - torch.iinfo(remainder).bits
    # Shifts are arithmetic ones: what they bring in from above is cut off by the conversion.
    high = torch.where(no_carry, cut, (rounded + 0x8000) >> 16)
    low = torch.where(no_carry, (pattern & 0xFFFF) >> (dropped + 1), rounded >> dropped)
    return high.to(torch.int16).view(torch.bfloat16), low.to(remainder)


def join(parameter: Tensor, remainder: Tensor) -> Tensor:
    """Read the master, float32, from bfloat16 values and their remainders, int16 or int8."""
    dropped = 16 - torch.iinfo(remainder.dtype).bits
    high = parameter.view(torch.int16).to(torch.int32) << 16
    low = remainder.to(torch.int32) << dropped
    magnitude = high & 0x7FFFFFFF
    low = torch.where(magnitude == LARGEST, low + low.clamp(min=0), low)
    pattern = (high & -0x80000000) | (magnitude + low).clamp_(min=0)
    return torch.where(magnitude >= INFINITY, high, pattern).view(torch.float32)
