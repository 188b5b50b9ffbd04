"""Work on a device: copies that nobody waits for, and whether a CUDA graph records it."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(destination: Tensor, values: Tensor, keep: list[Tensor] | None = None) -> None:
    """Copy a host tensor to ``destination`` without waiting for the device.

    A copy that is captured into a CUDA graph reads its source again at every replay: ``keep``
    then holds on to it.
    """
    if destination.device.type == "cpu":
        destination.copy_(values)
        return
    pinned = values.pin_memory()
    destination.copy_(pinned, non_blocking=True)
    if keep is not None and is_capturing(destination.device):
        keep.append(pinned)


def is_capturing(device: torch.device) -> bool:
    """Whether work sent to the device now is recorded into a CUDA graph instead of run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
