"""The PyTorch twin of ``kernels/codecs/cast.py``: how values are kept in memory.

The cast codec: arithmetic in float32, or in float64 where any operand is float64; stores round
to nearest, ties to even.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

STORABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of the real and imaginary parts, or the type itself if it is real."""
    return dtype.to_real() if dtype.is_complex else dtype


@cache
def real_dtypes(dtypes: tuple[torch.dtype, ...]) -> tuple[torch.dtype, ...]:
    """Do so for several."""
    return tuple(map(real_dtype, dtypes))


def compute_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the type that arithmetic on these operands is done in."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def decode(memory: Tensor, compute: torch.dtype) -> Tensor:
    """Widen a tensor to the compute type; a tensor of that type is returned as it is."""
    return memory if memory.dtype == compute else memory.to(compute)


def encode_positive(memory: Tensor, value: Tensor) -> None:
    """Do as ``encode``, but keep what is above 0 there: float16 has nothing below 6e-8."""
    encode(memory, positive(value))


def positive(value: Tensor) -> Tensor:
    """Raise what is above 0 to float16's smallest number at least."""
    return torch.where(value > 0, value.clamp(min=2.0**-24), value)


def encode(memory: Tensor, value: Tensor) -> None:
    """Round ``value`` to the type of ``memory`` and store it there."""
    if memory is not value:
        memory.copy_(value)
