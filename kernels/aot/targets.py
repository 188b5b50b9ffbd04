"""Targets of compilation: their names, and what is asked of them; the machine that compiles."""

from __future__ import annotations

import os
from typing import Any


def parse_target(text: str) -> Any:
    """Read ``cuda:90`` or ``hip:gfx942`` as a Triton target.

    Raises:
        ValueError: for anything else.
    """
    from triton.backends.compiler import GPUTarget

    backend, _, architecture = text.partition(":")
    if backend == "cuda" and architecture.isdigit():
        return GPUTarget("cuda", int(architecture), 32)
    if backend == "hip" and architecture.startswith("gfx"):
        # Compute cards (gfx9) have wavefronts of 64, graphics cards of 32.
        return GPUTarget("hip", architecture, 64 if architecture.startswith("gfx9") else 32)
    raise ValueError(f"a target is cuda:<capability> or hip:gfx<number>, got {text!r}")


def architecture(target: Any) -> str:
    """Name a target as ``parse_target`` reads it."""
    return f"{target.backend}:{target.arch}"


def processors() -> int:
    """How many processes to compile with: those that may be used, not those of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def capability(target: Any) -> int:
    """Compute capability times 10 (sm_90 is 90), or 0 for a target that is not NVIDIA's."""
    return int(target.arch) if target.backend == "cuda" else 0
