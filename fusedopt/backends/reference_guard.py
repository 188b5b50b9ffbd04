"""The twin of the guard against spikes: ``fusedopt/kernels/guard.py`` in PyTorch, on any device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels.guard import ACCEPTED, BOUND, HEADER, SKIPPED, ZSCORE


def decide(value: Tensor, control: Tensor, record: Tensor, min_steps: int, scaled: bool) -> None:
    """Decide whether a step is taken, and note it; the host reads nothing.

    Args:
        value: the norm of its gradients, float64 of shape ().
        control: element 1 is written with whether to skip.
        record: norms and counts; it is written.
        min_steps: norms below which nothing is decided.
        scaled: whether ``control[1]`` says already that a loss scaler found an overflow.
    """
    ring = record[HEADER:]
    places = torch.arange(len(ring), device=record.device)
    held = record[ACCEPTED].clamp(max=len(ring))
    # From one of them on, so that equal norms have a deviation of exactly zero.
    apart = torch.where(places < held, ring - ring[0], 0.0)
    shift = apart.sum() / held.clamp(min=1)
    squares = torch.where(places < held, (apart - shift).square(), 0.0)
    deviation = (squares.sum() / (held - 1).clamp(min=1)).sqrt()
    decides = (held >= min_steps) & (deviation > 0)
    z = torch.where(decides, (value - (ring[0] + shift)) / deviation, math.nan)

    is_taken = (value < math.inf) & ~(z > record[BOUND])
    overflow = (control[1] != 0) & scaled
    is_noted = ~overflow & (value != 0)
    control[1:2].copy_(~is_taken | overflow)
    here = places == record[ACCEPTED] % len(ring)
    ring.copy_(torch.where(here & is_noted & is_taken, value, ring))
    record[ACCEPTED].add_(is_noted & is_taken)
    record[SKIPPED].add_(is_noted & ~is_taken)
    record[ZSCORE].copy_(torch.where(is_noted, z, record[ZSCORE]))
