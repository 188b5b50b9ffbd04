"""Clipping by the norm of the backward pass before: what gradient release can have of clipping.

While a parameter is updated, the gradients of others are not there yet, so that no norm of all of
them is known. That of the last pass is, and this pass's is gathered meanwhile.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..clipping import GlobalNorm
from ..memory.device import is_capturing
from ..memory.storage import local_tensors
from ..step.norm import joined, last_norm, over_processes
from ..step.scale import GradScale
from ..step.span import Span
from .single import Single


class PreviousNorm:
    """The factor of a backward pass, formed by the norm of the last one; nobody waits for either.

    Attributes:
        clip: the optimizer's, at this pass.
    """

    def __init__(self) -> None:
        self.clip: GlobalNorm | None = None
        self._scales: dict[torch.device, GradScale] = {}
        self._span: Span | None = None
        # Of each device, partial sums of squares, or largest magnitudes.
        self._partials: dict[torch.device, list[Tensor]] = {}

    def scale_for(self, device: torch.device) -> GradScale:
        """Return what all launches on a device read."""
        if device not in self._scales:
            self._scales[device] = GradScale(device)
            self._set(self._scales[device])
        return self._scales[device]

    def begin(self, clip: GlobalNorm, span: Span | None) -> None:
        """Begin a backward pass: what one that failed has left is forgotten.

        Args:
            clip: how to clip.
            span: the processes that the norm is summed over; None for this one.

        Raises:
            RuntimeError: while a CUDA graph is captured.
        """
        if any(map(is_capturing, self._scales)):
            raise RuntimeError(
                'a CUDA graph would repeat max_norm as it is now: clip="previous" is not for'
                " captured steps"
            )
        self.clip, self._span = clip, span
        self._partials.clear()
        for scale in self._scales.values():
            self._set(scale)

    def _set(self, scale: GradScale) -> None:
        clip = self.clip
        if clip is None or clip.last is None:
            scale.values[:1].fill_(1.0)
            return
        last = clip.last.detach().to(scale.values.device, torch.float64)
        scale.values[:1].copy_(torch.clamp(clip.max_norm / (last + 1e-6), max=1.0).reshape(1))

    def note(self, single: Single) -> None:
        """Add the gradient of a parameter that was updated just now."""
        plan = single.engine.plan
        if plan is None or self.clip is None or single.parameter.grad is None:
            return
        infinity = self.clip.norm_type == math.inf
        (group,) = plan.device_groups
        inputs = [local_tensors([single.parameter.grad])]
        found = group.executor.partial_norms(inputs, group.scale.inverse_scale, infinity)
        if self._span is not None and not infinity:
            found = found * self._span.weights([single.parameter])[0]
        self._partials.setdefault(group.device, []).append(found)

    def finish(self) -> None:
        """End a backward pass: its norm is that by which the next one is clipped."""
        clip = self.clip
        if clip is None or not self._partials:
            return
        infinity = clip.norm_type == math.inf
        parts: dict[torch.device, Any] = {d: joined(x, d) for d, x in self._partials.items()}
        self._partials.clear()
        device = next(iter(parts))
        found = joined(list(parts.values()), device)
        total = (found.max() if infinity else found.sum()).reshape(1)
        if self._span is not None:
            total = over_processes(total, self._span, infinity, None)
        last_norm(clip, device).copy_((total if infinity else total.sqrt())[0])
