"""PyTorch operations for twins, with a coefficient that is a number or a 0-d tensor.

torch spells ``x + value * a * b`` in two ways, one for numbers (fused, one pass over memory) and
one for tensors. A twin that uses these helpers runs both from the host and inside a CUDA graph,
where reading a tensor's value is not allowed. A trailing underscore overwrites the first argument.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _cast(value: Any, like: Tensor) -> Any:
    return value.to(like.dtype) if isinstance(value, Tensor) else value


def add_(x: Tensor, a: Tensor, value: Any) -> Tensor:
    """``x + value * a``."""
    if isinstance(value, Tensor):
        return x.add_(_cast(value, x) * a)
    return x.add_(a, alpha=value)


def add_if(x: Tensor, a: Tensor, value: Any) -> Tensor:
    """``x + value * a``, and exactly ``x`` where value is 0, even if ``a`` is infinite."""
    if isinstance(value, Tensor):
        return torch.where(value != 0, x + _cast(value, x) * a, x)
    return torch.add(x, a, alpha=value) if value != 0 else x


def addcmul_(x: Tensor, a: Tensor, b: Tensor, value: Any) -> Tensor:
    """``x + value * a * b``."""
    if isinstance(value, Tensor):
        return x.add_(_cast(value, x) * a * b)
    return x.addcmul_(a, b, value=value)


def addcdiv_(x: Tensor, a: Tensor, b: Tensor, value: Any) -> Tensor:
    """``x + value * a / b``."""
    if isinstance(value, Tensor):
        return x.add_(_cast(value, x) * (a / b))
    return x.addcdiv_(a, b, value=value)


def lerp_(a: Tensor, b: Tensor, weight: Any) -> Tensor:
    """``a + weight * (b - a)``, anchored at the nearer end."""
    return a.lerp_(b, _cast(weight, a))


def scale(x: Tensor, value: Any) -> Tensor:
    """``value * x``, and ``x`` itself where the value is the number one."""
    if isinstance(value, Tensor):
        return x * _cast(value, x)
    return x if value == 1 else x * value


def scale_(x: Tensor, value: Any) -> Tensor:
    """``value * x``."""
    if isinstance(value, Tensor) or value != 1:
        x.mul_(_cast(value, x))
    return x


def divide_(x: Tensor, value: Any) -> Tensor:
    """``x / value``."""
    return x.div_(_cast(value, x))


def shift_(x: Tensor, value: Any) -> Tensor:
    """``x + value``."""
    return x.add_(_cast(value, x))
