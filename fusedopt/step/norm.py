"""Clipping within a step: the norm of all gradients, and the factor that comes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..backends import Inputs
from ..clipping import GlobalNorm
from .device_group import DeviceGroup


def clip_by_norm(
    clip: GlobalNorm, device_groups: Sequence[DeviceGroup], inputs: Sequence[Inputs]
) -> None:
    """Compute the norm over all device groups, and write the factor into the scale of each.

    Raises:
        RuntimeError: for a norm that is nan or infinite, where that is to be an error.
    """
    infinity = clip.norm_type == math.inf
    first = device_groups[0]
    partials = [
        group.executor.partial_norms(own, group.scale.inverse_scale, infinity)
        for group, own in zip(device_groups, inputs, strict=True)
    ]
    if len(partials) > 1:
        partials = [torch.cat([x.to(first.device) for x in partials])]
    scale = first.scale
    scale.set_max_norm(clip.max_norm)
    if clip.last is None or clip.last.device != first.device:
        clip.last = torch.zeros((), dtype=torch.float32, device=first.device)
    first.executor.clip_factor(
        partials[0], scale.inverse_scale, scale.max_norm, scale.values, clip.last, infinity
    )
    for group in device_groups[1:]:
        group.scale.values[:1].copy_(scale.values[:1])
    if clip.error_if_nonfinite and not math.isfinite(clip.last.item()):
        raise RuntimeError(
            f"the total norm of order {clip.norm_type} of the gradients is"
            f" {clip.last.item()}: nothing was updated. Pass error_if_nonfinite=False to"
            " clip by it anyway"
        )
