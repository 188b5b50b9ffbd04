"""What observed layers hand to autograd, held against the gradient that arrives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

import torch
from torch import Tensor


@dataclass(frozen=True)
class Expected:
    """What observed layers hand to autograd for a parameter in one call of the model.

    Attributes:
        tensor: the gradient, or the sum of contributions where autograd makes the gradient.
        version: how often the gradient has been written; None for a sum, equal to rounding.
        allowed: how far the sum may be from the gradient, of shape (); None for the gradient.
    """

    tensor: Tensor
    version: int | None
    allowed: Tensor | None


class Foreign(Enum):
    """Where a part of a gradient came from that no observed layer made."""

    OUTSIDE = auto()
    UNOBSERVED = auto()
    BEFORE = auto()


# What is allowed where several gradients are added up, beside their norms: a few roundings.
ADDED = {torch.float64: 1e-12, torch.float32: 1e-5}
ADDED_NARROW = 3e-2


def deviation(gradient: Tensor, expected: Sequence[Expected]) -> Tensor:
    """Whether a gradient is not the sum of what was expected, on the device."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    rounding = ADDED.get(gradient.dtype, ADDED_NARROW)
    distance = gradient.to(wide)
    allowed = torch.zeros((), dtype=wide, device=gradient.device)
    for one in expected:
        distance = distance - one.tensor
        part = rounding * one.tensor.norm(dtype=wide) if one.allowed is None else one.allowed
        allowed = allowed + part
    # What is not finite is told from its overflow, and not from its sums.
    return (distance.norm() > allowed) & gradient.isfinite().all()
