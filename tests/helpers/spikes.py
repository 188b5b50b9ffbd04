"""What a guard against spikes is to decide, one step after the other, by Python's statistics."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class Spikes:
    """A guard in plain Python, over lists of numbers.

    Attributes:
        norms: of the steps that were taken and count.
        skipped: how many steps were not.
        zscore: of the latest step that counts.
    """

    def __init__(self, bound: float, window: int, min_steps: int) -> None:
        self._bound, self._window, self._min_steps = bound, window, min_steps
        self.norms: list[float] = []
        self.skipped = 0
        self.zscore = math.nan

    def takes(self, norm: float) -> bool:
        """Say whether a step with this norm is taken, and note it."""
        if norm == 0:
            return True
        last = self.norms[-self._window :]
        self.zscore = math.nan
        if len(last) >= self._min_steps and len(set(last)) > 1:
            self.zscore = (norm - statistics.fmean(last)) / statistics.stdev(last)
        if not math.isfinite(norm) or self.zscore > self._bound:
            self.skipped += 1
            return False
        self.norms.append(norm)
        return True


def norm_of(gradients: Sequence[Tensor], order: float = 2.0) -> float:
    """The norm of gradients in float64."""
    flat = torch.cat([g.double().reshape(-1) for g in gradients])
    return torch.linalg.vector_norm(flat, order).item()


def spiky(shapes: Sequence[tuple[int, ...]], steps: int, seed: int = 0) -> Iterator[list[Tensor]]:
    """Yield gradients of a run with every kind of step: spikes, inf, nan, zeros, a slow growth."""
    drawn = torch.Generator().manual_seed(seed)
    for step in range(steps):
        gradients = [torch.randn(shape, generator=drawn) * 1.03**step for shape in shapes]
        if step % 11 == 5:
            gradients = [50.0 * g for g in gradients]
        if step in (0, 8, 30):
            gradients[-1].view(-1)[0] = math.nan
        if step in (2, 19):
            gradients[0].view(-1)[-1] = -math.inf
        if step in (1, 21):
            gradients = [torch.zeros_like(g) for g in gradients]
        yield gradients
