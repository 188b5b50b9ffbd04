"""Clipping within a step: the norm of all gradients, and the factor that comes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, distributed

from ..backends import Executor, Inputs
from ..clipping import GlobalNorm
from ..guard import SpikeGuard
from .device_group import DeviceGroup
from .scale import GradScale
from .span import Span


def clip_by_norm(
    clip: GlobalNorm,
    device_groups: Sequence[DeviceGroup],
    inputs: Sequence[Inputs],
    span: Span | None = None,
    found_inf: Tensor | None = None,
    guard: SpikeGuard | None = None,
) -> None:
    """Compute the norm over all device groups, and write the factor into the scale of each.

    Args:
        clip: how to clip.
        device_groups: of this process.
        inputs: of each.
        span: the processes that the norm is summed over; None for this one.
        found_inf: whether a loss scaler has found an overflow here. One of another process then
            shows in the norm, and the step is marked to be skipped on all.
        guard: decides by the norm whether the step is to be skipped.

    Raises:
        RuntimeError: for a norm that is nan or infinite, where that is to be an error.
    """
    infinity = clip.norm_type == math.inf
    first = device_groups[0]
    partials = [
        group.executor.partial_norms(own, group.scale.inverse_scale, infinity)
        for group, own in zip(device_groups, inputs, strict=True)
    ]
    if span is not None:
        if not infinity:
            weights = [group.norm_weights for group in device_groups]
            partials = [x if w is None else x * w for x, w in zip(partials, weights, strict=True)]
        total = joined(partials, first.device)
        total = (total.max() if infinity else total.sum()).reshape(1)
        partials = [over_processes(total, span, infinity, found_inf)]
        if found_inf is not None:
            first.scale.skip_unless_finite(partials[0])
    scale = first.scale
    scale.set_max_norm(clip.max_norm)
    scaled = found_inf is not None
    _form_factor(clip, joined(partials, first.device), first.executor, scale, guard, scaled)
    first.note_norm(last_norm(clip, first.device))
    for group in device_groups[1:]:
        group.scale.values.copy_(scale.values)
    _check_finite(clip)


def join_norm(
    clip: GlobalNorm,
    span: Span,
    device: torch.device,
    found_inf: Tensor | None,
    executor: Executor,
    guard: SpikeGuard | None,
) -> None:
    """Take part in the norm of a step in which nothing is to be updated in this process.

    Args:
        clip: how the others clip.
        span: the processes that the norm is summed over.
        device: where this process has its parameters.
        found_inf: whether a loss scaler has found an overflow here.
        executor: of nothing, on the device.
        guard: as of the others: it notes what theirs do.
    """
    infinity = clip.norm_type == math.inf
    total = torch.zeros(1, dtype=torch.float64, device=device)
    total = over_processes(total, span, infinity, found_inf)
    scale = GradScale(device)
    if found_inf is not None:
        scale.skip_unless_finite(total)
    _form_factor(clip, total, executor, scale, guard, found_inf is not None)
    _check_finite(clip)


def _form_factor(
    clip: GlobalNorm,
    partials: Tensor,
    executor: Executor,
    scale: GradScale,
    guard: SpikeGuard | None,
    scaled: bool,
) -> None:
    """Have the norm, the factor and a guard's decision made of partial norms, by one kernel."""
    norm, infinity = last_norm(clip, partials.device), clip.norm_type == math.inf
    written = scale.inverse_scale, scale.max_norm, scale.values, norm
    if guard is None:
        executor.clip_factor(partials, *written, infinity)
        return
    record = guard.record_on(partials.device)
    executor.guarded_factor(partials, *written, infinity, record, guard.min_steps, scaled)
    scale.skip_is_decided()


def joined(partials: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return vectors one behind the other, on one device."""
    if len(partials) == 1:
        return partials[0]
    return torch.cat([x.to(device) for x in partials])


def over_processes(total: Tensor, span: Span, infinity: bool, found_inf: Tensor | None) -> Tensor:
    """Return the sum, or the maximum, of one number of each process: the only collective."""
    if found_inf is not None:
        overflow = found_inf.to(total.device).reshape(1) != 0
        total = torch.where(overflow, math.inf, total)
    if not infinity:
        distributed.all_reduce(total, group=span.group)
        return total
    # As integers: the order of numbers that are not negative is that of their bits, with nan above
    # infinity, where a maximum of floats may lose it.
    bits = torch.where(total.isnan(), math.nan, total).view(torch.int64)
    distributed.all_reduce(bits, distributed.ReduceOp.MAX, group=span.group)
    return bits.view(torch.float64)


def last_norm(clip: GlobalNorm, device: torch.device) -> Tensor:
    """Return ``clip.last``, where the norm is written for the user."""
    if clip.last is None or clip.last.device != device:
        clip.last = torch.zeros((), dtype=torch.float32, device=device)
    return clip.last


def _check_finite(clip: GlobalNorm) -> None:
    if clip.error_if_nonfinite and clip.last is not None and not math.isfinite(clip.last.item()):
        raise RuntimeError(
            f"the total norm of order {clip.norm_type} of the gradients is"
            f" {clip.last.item()}: nothing was updated. Pass error_if_nonfinite=False to"
            " clip by it anyway"
        )
