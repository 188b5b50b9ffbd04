"""Cautious weight decay: only where the update takes the parameter towards zero, too.

    p = p - lr (u + wd [u p >= 0] p)

of each element, where u is the direction of the optimizer and p the parameter before the step.
Where the update leads away from zero, decay would work against it, and there is none. Chen et al.,
arXiv 2510.12402, "Cautious Weight Decay". No byte more is moved: u is at hand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import torch_ops as T
from ..lang import jit, tl, where  # noqa: F401  # Triton's interpreter looks for tl
from ..rule import Group

# Entry of the parameter groups.
NAME = "cautious_weight_decay"


def is_cautious(group: Group) -> bool:
    """Whether the decay of a group is cautious."""
    return bool(group.get(NAME))


@jit
def shrunk(p, u, shrink):
    """Multiply a block by ``shrink`` = 1 - lr wd, where the step is along ``-u`` towards zero."""
    # Not the sign of a product, which may be too small to have one.
    return where(where(p < 0.0, -u, u) >= 0.0, p * shrink, p)


def shrunk_twin(p: Tensor, u: Tensor, shrink: Any) -> Tensor:
    """State it in PyTorch."""
    agrees = torch.where(p < 0, -u, u) >= 0
    return torch.where(agrees, T.scale(p, shrink), p)
