"""The PyTorch twin of ``kernels/codecs/kahan.py``: what rounding a parameter has left over.

What is stored, and what counts where somebody else has written the parameter, is said there.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Split float32 values into parameter and compensation, both of a type of 16 bits."""
    parameter = value.to(dtype)
    shown = parameter.float()
    finite = shown.isfinite()
    shown = torch.where(finite, shown, 0.0)
    compensation = (torch.where(finite, value, 0.0) - shown).to(dtype)
    moved = (shown + compensation.float()).to(dtype).float() != shown
    return parameter, (compensation.view(torch.int16) - moved.to(torch.int16)).view(dtype)


def join(parameter: Tensor, compensation: Tensor) -> Tensor:
    """Read in float32 what parameter and compensation, of one type, stand for."""
    value = parameter.float()
    total = value + compensation.float()
    same = total.to(parameter.dtype).view(torch.int16) == parameter.view(torch.int16)
    return torch.where(same, total, value)
