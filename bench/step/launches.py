"""What one step launches on a GPU, as the profiler sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_COPIES = ("Memcpy", "Memset")


def launches(step: Callable[[], Any], device: torch.device) -> dict[str, int | None]:
    """Return the numbers of kernels, and of copies and fills by the copy engine, in one step.

    Returns:
        Both None on a CPU, and where the profiler sees nothing (it may not be allowed to).
    """
    nothing: dict[str, int | None] = {"launches": None, "copies": None}
    if device.type == "cpu":
        return nothing
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    try:
        with torch.profiler.profile(activities=activities) as profile:
            step()
            torch.cuda.synchronize()
        events = [e for e in profile.events() if e.device_type.name == "CUDA"]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return nothing
    # What an optimizer calls its step is drawn over its kernels, as if it were one.
    names = [e.name for e in events if not e.is_user_annotation]
    if not names:
        return nothing
    copies = sum(name.startswith(_COPIES) for name in names)
    return {"launches": len(names) - copies, "copies": copies}
