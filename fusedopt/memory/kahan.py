"""The PyTorch twin of ``kernels/codecs/kahan.py``: what rounding a parameter has left over.

What is stored, and what counts where somebody else has written the parameter, is said there.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Split float32 values into parameter and compensation, both of a type of 16 bits."""
    parameter = value.to(dtype)
    return parameter, rest(value, parameter)


def rest(value: Tensor, parameter: Tensor) -> Tensor:
    """Return the compensation beside a parameter that is within half a unit of float32 values."""
    shown = parameter.float()
    finite = shown.isfinite()
    shown = torch.where(finite, shown, 0.0)
    compensation = (torch.where(finite, value, 0.0) - shown).to(parameter.dtype)
    moved = (shown + compensation.float()).to(parameter.dtype).float() != shown
    return (compensation.view(torch.int16) - moved.to(torch.int16)).view(parameter.dtype)


def join(parameter: Tensor, compensation: Tensor) -> Tensor:
    """Read in float32 what parameter and compensation, of one type, stand for."""
    value = parameter.float()
    total = value + compensation.float()
    same = total.to(parameter.dtype).view(torch.int16) == parameter.view(torch.int16)
    return torch.where(same, total, value)
