"""States that are created and nothing else, for who asks for them before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..completion import is_creating
from ..formats import keeps_state
from ..memory.device import is_capturing
from ..memory.storage import local_tensors
from ..step.request import gather_params
from ..step.states import create_states


def is_initialising(optimizer: Any) -> bool:
    """Whether a step of an optimizer that has no state yet is only to create states.

    Distributed checkpoint calls ``step()`` of an optimizer without any state, with every lr at 0
    and gradients of zeros. They are looked at, on the host, where the first two hold. Where the
    statistics do have what a step needs, it is the first step of a warm-up. As a step it would
    count one, and weight decay would go into the moments: a run that was asked for its state before
    its first step would go on otherwise than one that was not.

    A rule that reads gradients alone could take such a step in earnest, while another process has
    gradients that are not zero: there, distributed checkpoint has to be the caller.
    """
    rule = optimizer.rule
    if optimizer.state or not any(keeps_state(rule, group) for group in optimizer.param_groups):
        return False
    feeds = optimizer.statistics is not None or len(rule.degrees) > 1
    if not feeds and not is_creating():
        return False
    gradients = list(_gradients(optimizer))
    # Nothing may be read during a capture.
    if not gradients or any(map(is_capturing, {g.device for g in gradients})):
        return False
    if not all(_is_zero(group.get("lr", 0)) for group in optimizer.param_groups):
        return False
    if any(g.layout != torch.strided or g.is_meta for g in gradients):
        return False
    if any(bool(g.count_nonzero()) for g in local_tensors(gradients)):
        return False
    if optimizer.statistics is None:
        return True
    try:
        params, _, _ = gather_params(optimizer)
        optimizer.statistics.check(params)
    except (RuntimeError, ValueError):
        return True
    return not params


def _is_zero(lr: Any) -> bool:
    return bool(lr == 0)


def _gradients(optimizer: Any) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from (p.grad for p in group["params"] if p.grad is not None)


def initialise(optimizer: Any) -> None:
    """Create the states of every parameter with a gradient, at zero, and change nothing else."""
    params: list[Tensor] = []
    group_of: list[int] = []
    for index, group in enumerate(optimizer.param_groups):
        with_gradient = [p for p in group["params"] if p.grad is not None]
        params += with_gradient
        group_of += [index] * len(with_gradient)
    create_states(optimizer, params, local_tensors(params), group_of)
