"""States as torch's optimizer of the same name keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..formats.convert import decoded
from ..kernels.rule import Group, Rule


def export_state_dict(optimizer: Any) -> dict[str, Any]:
    """Return the state as torch's optimizer of the same name keeps it, in float32.

    It loads into torch's optimizer, and into ours however that keeps its states. What compressed
    states lose has been lost before: decoding is exact. Of a parameter's master only the parameter
    itself is exported, with the model.

    Args:
        optimizer: one of fusedopt's.

    Returns:
        What ``state_dict()`` of torch's optimizer returns. Tensors are copies, on the same device.

    Raises:
        TypeError: for another optimizer.
        ValueError: for states that torch's optimizer has no name for, of another form of momentum.
    """
    if not hasattr(optimizer, "rule"):
        raise TypeError(
            f"{type(optimizer).__name__} is none of fusedopt's optimizers: its state_dict() is what"
            " torch's return"
        )
    rule = optimizer.rule
    saved = torch.optim.Optimizer.state_dict(optimizer)
    states: dict[Any, Any] = {}
    for own, group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        form = optimizer.form
        if form is not None and group.get(form) not in (None, "torch"):
            raise ValueError(
                f"torch's {type(optimizer).__name__} has no {form}={group[form]!r}: its states mean"
                " something else"
            )
        for name in optimizer.extra_options:
            group.pop(name, None)
        for key, p in zip(group["params"], own["params"], strict=True):
            state = optimizer.state.get(p)
            if state:
                states[key] = _exported(p, state, rule, own)
    return {"state": states, "param_groups": saved["param_groups"]}


def _exported(p: Tensor, state: Mapping[str, Any], rule: Rule, group: Group) -> dict[str, Any]:
    names = rule.states(group)
    found = {}
    for name, value in state.items():
        if name in names and isinstance(value, Tensor):
            plain = decoded(p, state, name, rule)
            dtype = torch.complex64 if p.is_complex() else torch.float32
            wide = torch.promote_types(plain.dtype, dtype)
            found[name] = plain.to(wide, copy=plain is value)
        elif name == "step" and rule.counts_steps:
            found[name] = value.clone() if isinstance(value, Tensor) else value
    return found
