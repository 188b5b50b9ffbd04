"""Streams of a device, and the memory that launches on them read.

The allocator gives freed memory to the next tensor of the stream that it was allocated on, which is
safe for work on that stream alone. A plan is made on the stream of one step and may be used on
another; what it holds is freed when it is dropped, by whichever thread, at whichever time. So every
stream that has read the memory is made known to the allocator, which then waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def current(device: torch.device) -> Any:
    """Return the stream that work on the device is sent to now."""
    return torch.get_device_module(device).current_stream(device)


def record(tensor: Tensor, stream: Any) -> None:
    """Keep the tensor's memory, once it is freed, until what the stream has to do now is done."""
    tensor.record_stream(stream)


class Readers:
    """The streams that have read the memory of one owner, each made known to the allocator once.

    Args:
        device: of the memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._known: set[Any] = set()

    def note(self, memory: Callable[[], Iterable[Tensor]]) -> None:
        """Note that the current stream reads the owner's memory.

        Args:
            memory: lists the owner's tensors; they stay the same from the first call on.
        """
        stream = current(self.device)
        if stream in self._known:
            return
        for tensor in memory():
            if tensor.device.type == self.device.type:
                record(tensor, stream)
        self._known.add(stream)


def readers(device: torch.device) -> Readers | None:
    """Return what notes the streams of a device, or None for one that has none."""
    return None if device.type == "cpu" else Readers(device)
