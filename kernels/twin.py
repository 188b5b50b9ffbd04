"""PyTorch operations for twins, with a coefficient that is a number or a 0-d tensor.

torch spells ``x + value * a * b`` in two ways, one for numbers (fused, one pass over memory) and
one for tensors. A twin that uses these helpers runs both from the host and inside a CUDA graph,
where reading a tensor's value is not allowed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _cast(value: Any, like: Tensor) -> Any:
    return value.to(like.dtype) if isinstance(value, Tensor) else value


def add(x: Tensor, a: Tensor, value: Any) -> Tensor:
    """``x + value * a``."""
    if isinstance(value, Tensor):
        return x + _cast(value, x) * a
    return torch.add(x, a, alpha=value)


def addcmul(x: Tensor, a: Tensor, b: Tensor, value: Any) -> Tensor:
    """``x + value * a * b``."""
    if isinstance(value, Tensor):
        return x + _cast(value, x) * a * b
    return torch.addcmul(x, a, b, value=value)


def addcdiv(x: Tensor, a: Tensor, b: Tensor, value: Any) -> Tensor:
    """``x + value * a / b``."""
    if isinstance(value, Tensor):
        return x + _cast(value, x) * (a / b)
    return torch.addcdiv(x, a, b, value=value)


def lerp(a: Tensor, b: Tensor, weight: Any) -> Tensor:
    """``a + weight * (b - a)``, anchored at the nearer end."""
    return torch.lerp(a, b, _cast(weight, a))


def scale(x: Tensor, value: Any) -> Tensor:
    """``value * x``, and ``x`` itself where the value is the number one."""
    if isinstance(value, Tensor):
        return x * _cast(value, x)
    return x if value == 1 else x * value


def divide(x: Tensor, value: Any) -> Tensor:
    """``x / value``."""
    return x / _cast(value, x)


def add_if(x: Tensor, a: Tensor, value: Any) -> Tensor:
    """``x + value * a``, and exactly ``x`` where value is 0, even if ``a`` is infinite."""
    if isinstance(value, Tensor):
        return torch.where(value != 0, add(x, a, value), x)
    return add(x, a, value) if value != 0 else x


def shift(x: Tensor, value: Any) -> Tensor:
    """``x + value``."""
    return x + _cast(value, x)
