"""States of parameters: made at zero when first needed, and taken back where no step came of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..formats import format_of, keeps_steps
from ..formats.tensors import begin_as_copy, make_tensor, starts_as_copy
from ..memory.dtensor import dtensor_class, sharded_like
from .counts import State, new_steps


def create_states(
    optimizer: Any, params: Sequence[Tensor], local_params: Sequence[Tensor], group_of: list[int]
) -> tuple[list[State], list[list[str]]]:
    """Create the states that are missing, at zero.

    Args:
        optimizer: whose states.
        params: the parameters.
        local_params: what of them lies in this process.
        group_of: for each parameter, the index of its group.

    Returns:
        The state dictionaries, and the names of what was created in each.
    """
    rule = optimizer.rule
    formats = [format_of(rule, group) for group in optimizer.param_groups]
    counts = [keeps_steps(rule, group) for group in optimizer.param_groups]
    kept = [bool(format.names) or own for format, own in zip(formats, counts, strict=True)]
    states = _dictionaries(optimizer, params, [kept[index] for index in group_of])
    cut = dtensor_class()
    created: list[list[str]] = []
    uncounted: list[State] = []
    memory: list[Tensor] = []
    for p, local, state, index in zip(params, local_params, states, group_of, strict=True):
        format = formats[index]
        absent = [n for n in format.names if state.get(n) is None]
        for name in absent:
            if format.is_plain:
                # As ``make_tensor``, with less to ask.
                new = torch.empty_like(local if type(p) is cut else p)
                state[name] = sharded_like(p, new) if type(p) is cut else new
            else:
                state[name], new = make_tensor(p, local, name, format)
            if starts_as_copy(name, format):
                begun = {n: x for n, x in state.items() if n not in absent}
                begin_as_copy(new, local, name, format, begun)
            else:
                # An 8-bit float of zeros is zeros, whose type not every device can fill.
                memory.append(new.view(torch.uint8) if new.dtype == torch.float8_e4m3fn else new)
        if counts[index] and "step" not in state:
            uncounted.append(state)
            absent.append("step")
        created.append(absent)
    if memory:
        # One launch of many tensors, not one each.
        torch._foreach_zero_(memory)
    for state, step in zip(uncounted, new_steps(len(uncounted)), strict=True):
        state["step"] = step
    return states, created


def _dictionaries(optimizer: Any, params: Sequence[Tensor], kept: list[bool]) -> list[State]:
    """Return the parameters' state dictionaries; where nothing is kept, they stand for themselves.

    As few look-ups as can be: each hashes a tensor, which is a call into Python.
    """
    if optimizer.state:
        found = list(map(optimizer.state.get, params))
    else:
        found = [None] * len(params)
    states = [{} if state is None else state for state in found]
    missing = [i for i, state in enumerate(found) if state is None and kept[i]]
    optimizer.state.update([(params[i], states[i]) for i in missing])
    return states


def remove_states(optimizer: Any, p: Tensor, names: Sequence[str]) -> None:
    """Remove states of a parameter, and what is left empty by it."""
    state = optimizer.state[p]
    for name in names:
        del state[name]
    if not state:
        del optimizer.state[p]
