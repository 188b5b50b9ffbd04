"""Step counts: ``state["step"]`` of many parameters, kept in one buffer.

torch keeps a scalar tensor for each parameter, and adding one to a thousand of them costs more
than the whole rest of a fused step. Here each ``state["step"]`` is a view of one element of a
shared buffer: still a tensor of its own for checkpoints, copies and edits, but one addition
advances them all.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]


def new_step() -> Tensor:
    """Return a step count of zero, in the type that torch.optim uses."""
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    return torch.zeros((), dtype=dtype)


class StepCounter:
    """The step counts of the parameters that advance together."""

    def __init__(self, states: Sequence[State], device: torch.device) -> None:
        dtype = new_step().dtype
        counts = [torch.as_tensor(s["step"]).reshape(()).to(device, dtype) for s in states]
        self.buffer = torch.stack(counts)
        self._states = list(states)
        self._views = list(self.buffer.unbind())
        self._increment = torch.ones(1, dtype=dtype, device=device)
        for state, view in zip(states, self._views, strict=True):
            state["step"] = view

    def owned(self) -> bool:
        """Whether the parameters' step counts are still the views handed out."""
        steps = map(operator.itemgetter("step"), self._states)
        return all(map(operator.is_, steps, self._views))

    def advance(self, found_inf: Tensor | None = None) -> None:
        """Count one step more, or none where ``found_inf`` is 1."""
        if found_inf is None:
            self.buffer.add_(1)
            return
        self._increment.copy_(found_inf.reshape(1)).neg_().add_(1)
        self.buffer.add_(self._increment)
