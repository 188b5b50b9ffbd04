"""Optimizers around optimizers: which one has the state."""

from __future__ import annotations

import sys
from typing import Any

from torch.optim import Optimizer

_ZERO = "torch.distributed.optim.zero_redundancy_optimizer"


def state_holder(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that has the state of the parameters of `optimizer`.

    ``ZeroRedundancyOptimizer`` has the hyper-parameters, and each rank's ``optim`` the state of its
    part of the parameters. What the wrapper's own ``state`` has, after a checkpoint was loaded, is
    not stepped with. Other wrappers, as accelerate's, hand groups and state through.

    Raises:
        ValueError: for a ``ZeroRedundancyOptimizer`` whose optimizer DDP makes, and has not yet, or
            which is none of torch.optim.
    """
    if _ZERO in sys.modules and isinstance(optimizer, sys.modules[_ZERO].ZeroRedundancyOptimizer):
        inner = getattr(optimizer, "optim", None)
        if not isinstance(inner, Optimizer):
            raise ValueError(
                "ZeroRedundancyOptimizer with overlap_with_ddp=True cannot be rescaled: it takes"
                " its hyper-parameters from the constructor alone"
            )
        return inner
    for inner in _held(optimizer):
        if inner.state is optimizer.state and inner.param_groups is optimizer.param_groups:
            return inner
    return optimizer


def has_state_elsewhere(optimizer: Optimizer) -> bool:
    """Whether the optimizer is without state, and one that it holds is not."""
    if any(optimizer.state.values()):
        return False
    return any(any(inner.state.values()) for inner in _held(optimizer))


def _held(optimizer: Any) -> list[Optimizer]:
    return [x for x in vars(optimizer).values() if isinstance(x, Optimizer) and x is not optimizer]
