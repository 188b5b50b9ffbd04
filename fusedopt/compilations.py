"""What Triton compiles: how much, and by which key it finds that again on disk."""

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


# Device functions whose key is settled, by id; held, so that an id is not given away again.
_settled: dict[int, Any] = {}


def settle(function: Any) -> None:
    """Make a kernel's key on disk independent of what the process has launched before.

    Triton takes the global constants that a function's callees use into its key, as far as the
    callees have keys already. So one kernel has several keys, and which of them holds depends on
    the order of the first launches: on a warm cache it would be compiled again. Callees get theirs
    first here.

    Args:
        function: a ``@jit`` function, before its first launch. Anything else is left alone, as the
            interpreter's functions are.
    """
    if id(function) in _settled:
        return
    # Before its callees: a function may call itself.
    _settled[id(function)] = function
    if lang.triton is None or not isinstance(function, lang.triton.JITFunction):
        return
    names = function.fn.__code__.co_names
    for callee in map(function.fn.__globals__.get, names):
        if isinstance(callee, lang.triton.JITFunction):
            settle(callee)
    # Computed at its first use.
    _ = function.cache_key
