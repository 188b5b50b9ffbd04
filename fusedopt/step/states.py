"""States of parameters: made at zero when first needed, and taken back where no step came of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .counts import State, new_step


def create_states(
    optimizer: Any, params: Sequence[Tensor], group_of: Sequence[int]
) -> list[list[str]]:
    """Create the states that are missing, at zero; return their names for each parameter."""
    rule = optimizer.rule
    names_of = [rule.states(group) for group in optimizer.param_groups]
    created = []
    for p, index in zip(params, group_of, strict=True):
        state: State = optimizer.state[p] if names_of[index] or rule.counts_steps else {}
        missing = [n for n in names_of[index] if state.get(n) is None]
        for name in missing:
            state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        if rule.counts_steps and "step" not in state:
            state["step"] = new_step()
            missing.append("step")
        created.append(missing)
    return created


def remove_states(optimizer: Any, p: Tensor, names: Sequence[str]) -> None:
    """Remove states of a parameter, and what is left empty by it."""
    state = optimizer.state[p]
    for name in names:
        del state[name]
    if not state:
        del optimizer.state[p]
