"""What is timed: a contender's optimizer in the protocol that its users follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .workload import Workload


class Unsupported(Exception):
    """The contender has no such rule, type or option."""


@dataclass
class TimedStep:
    """One thing to time.

    Attributes:
        step: everything between the backward pass and the next forward pass.
        optimizer: whose states it has.
        scaler: of the loss, if any.
    """

    step: Callable[[], Any]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None = field(default=None)


def loss_scaler(device: torch.device, scale: float) -> torch.amp.GradScaler:
    """Return a scaler that has seen a loss, and does not change its scale."""
    scaler = torch.amp.GradScaler(device.type, init_scale=scale, growth_interval=2**30)
    scaler.scale(torch.zeros((), device=device))
    return scaler


def timed_step(
    optimizer: torch.optim.Optimizer,
    params: Sequence[Tensor],
    step: Callable[[], Any],
    max_norm: float | None,
    scaler: torch.amp.GradScaler | None,
) -> TimedStep:
    """Clip by torch's function and unscale by torch's scaler, in front of the step.

    Args:
        optimizer: whose step it is.
        params: of the optimizer.
        step: the optimizer's, or that compiled.
        max_norm: to clip to; None where nothing is clipped, or the step does it.
        scaler: of the loss, or None.
    """

    if scaler is not None and _unscales(optimizer, max_norm) and _has_half(params):
        raise Unsupported("torch's GradScaler does not unscale float16 gradients")

    def clip() -> None:
        torch.nn.utils.clip_grad_norm_(params, max_norm, foreach=True)

    def run() -> None:
        if max_norm is not None:
            clip()
        step()

    def run_scaled() -> None:
        assert scaler is not None
        if max_norm is not None:
            scaler.unscale_(optimizer)
            clip()
        scaler.step(optimizer)
        scaler.update()

    return TimedStep(run if scaler is None else run_scaled, optimizer, scaler)


def _unscales(optimizer: torch.optim.Optimizer, max_norm: float | None) -> bool:
    """Whether the scaler, and not the step, divides gradients by the scale."""
    return max_norm is not None or not getattr(optimizer, "_step_supports_amp_scaling", False)


def _has_half(params: Sequence[Tensor]) -> bool:
    return any(p.grad is not None and p.grad.dtype == torch.float16 for p in params)


def seed_states(
    optimizer: torch.optim.Optimizer, workload: Workload, step_device: torch.device | None
) -> None:
    """Give an optimizer of torch's layout the states that all contenders share.

    Args:
        optimizer: without states yet.
        workload: whose states, in the codec's type.
        step_device: where its step counts live; None where it keeps none.
    """
    for i, p in enumerate(workload.params):
        state: dict[str, Tensor] = {}
        if step_device is not None:
            state["step"] = torch.zeros((), dtype=torch.float32, device=step_device)
        for name, arena in workload.states.items():
            state[name] = arena.views[i]
        if state:
            optimizer.state[p] = state
