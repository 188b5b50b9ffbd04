"""States of parameters: made at zero when first needed, and taken back where no step came of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..memory.dtensor import is_dtensor, local_of, sharded_like
from .counts import State, new_steps


def create_states(
    optimizer: Any, params: Sequence[Tensor], group_of: Sequence[int]
) -> list[list[str]]:
    """Create the states that are missing, at zero; return their names for each parameter."""
    rule = optimizer.rule
    names_of = [rule.states(group) for group in optimizer.param_groups]
    created: list[list[str]] = []
    missing: list[State] = []
    memory: list[Tensor] = []
    for p, index in zip(params, group_of, strict=True):
        state: State = optimizer.state[p] if names_of[index] or rule.counts_steps else {}
        absent = [n for n in names_of[index] if state.get(n) is None]
        for name in absent:
            state[name], local = _empty_like(p)
            memory.append(local)
        if rule.counts_steps and "step" not in state:
            missing.append(state)
            absent.append("step")
        created.append(absent)
    if memory:
        # One launch of many tensors, not one each.
        torch._foreach_zero_(memory)
    for state, step in zip(missing, new_steps(len(missing)), strict=True):
        state["step"] = step
    return created


def _empty_like(p: Tensor) -> tuple[Tensor, Tensor]:
    """Make a state for a parameter; return it, and what of it lies in this process."""
    local = torch.empty_like(local_of(p) if is_dtensor(p) else p)
    return (sharded_like(p, local) if is_dtensor(p) else local), local


def remove_states(optimizer: Any, p: Tensor, names: Sequence[str]) -> None:
    """Remove states of a parameter, and what is left empty by it."""
    state = optimizer.state[p]
    for name in names:
        del state[name]
    if not state:
        del optimizer.state[p]
