"""How much Triton compiles in a process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from .kernels import lang


@dataclass
class Compilations:
    """What was compiled in this process since counting began.

    Attributes:
        compiled: kernels that the compiler made, since no cache on disk had them.
        cached: kernels read from the cache on disk. What a process has launched before is neither.
        seconds: time in the compiler.
        names: the kernels compiled, in order; one for each variant.
    """

    compiled: int = 0
    cached: int = 0
    seconds: float = 0.0
    names: list[str] = field(default_factory=list)


@contextmanager
def compilations() -> Iterator[Compilations]:
    """Count kernels compiled while the context is open.

    Counts may be nested; whatever listener was set before goes on hearing. Where Triton is missing
    or runs its interpreter, nothing is compiled and nothing counted.
    """
    seen = Compilations()
    if lang.triton is None:
        yield seen
        return
    from triton import knobs

    previous = knobs.compilation.listener

    def listen(**event: Any) -> None:
        if event["cache_hit"]:
            seen.cached += 1
        else:
            seen.compiled += 1
            seen.seconds += event["times"].total / 1e6
            seen.names.append(event["src"].name)
        if previous is not None:
            previous(**event)

    knobs.compilation.listener = listen
    try:
        yield seen
    finally:
        knobs.compilation.listener = previous
