"""Bit patterns of float32 on which codecs go wrong, and arithmetic on patterns."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

CHECKOUT = Path(__file__).resolve().parents[2]
# tools are not installed. Last, so that they hide nothing that is.
sys.path.append(str(CHECKOUT))

# Leading seven bits of a mantissa, and what is cut off of it: none, ties of 16 and of 8 bits and
# what lies beside them, all.
_UPPER = (0x00, 0x01, 0x3F, 0x40, 0x7E, 0x7F)
_LOWER = (0x0000, 0x0001, 0x007F, 0x0080, 0x0081, 0x0180, 0x7F7F, 0x7F80, 0x7F81, 0x7FFF)
_LOWER += (0x8000, 0x8001, 0x807F, 0x8080, 0x8081, 0xFF7F, 0xFF80, 0xFFFF)
# nans whose bits lie in one half alone or are all set, and values at the border to infinity.
_NAMED = (0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001, 0x7FC00000, 0x7F80FFFF, 0x7FFF8000)
_NAMED += (0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F7EFFFF, 0x7F7F0000, 0xFF7F8000)


def float32(pattern: Tensor) -> Tensor:
    """Values of patterns, of which the lower 32 bits count."""
    return pattern.to(torch.int32).view(torch.float32)


def special(device: torch.device | str = "cpu") -> Tensor:
    """Values of every sign and exponent with what is hard to round, and 2^18 at random."""
    upper = torch.arange(512)[:, None, None] << 23 | torch.tensor(_UPPER)[:, None] << 16
    every = (upper | torch.tensor(_LOWER)).flatten()
    random = torch.randint(1 << 32, (1 << 18,), generator=torch.Generator().manual_seed(0))
    return float32(torch.cat((every, torch.tensor(_NAMED), random))).to(device)


def magnitudes(values: Tensor) -> Tensor:
    """Patterns without their signs: of two neighbours, they differ by one."""
    return values.view(torch.int32) & 0x7FFFFFFF


def every_narrow(dtype: torch.dtype) -> Tensor:
    """All values of a type of 16 bits."""
    return torch.arange(1 << 16).to(torch.int16).view(dtype)
