"""What tests of the layers of ``PerSampleSquares`` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

each_order = pytest.mark.parametrize(
    "batch_first", [True, False], ids=["batch-first", "time-first"]
)

# torch says so itself for even kernels, whose padding is one more on one side.
even_kernels = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")

Factory = Callable[[], tuple[Any, ...]]


def random_norm(norm: nn.Module) -> nn.Module:
    """A norm whose gain and offset are not the ones and zeros they start as."""
    with torch.no_grad():
        for p in norm.parameters():
            p.copy_(torch.randn_like(p))
    return norm


def evaluated_norm(norm: nn.Module) -> nn.Module:
    norm = random_norm(norm)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    return norm.eval()
