"""Bytes that a step reads and writes, a parameter: counted, not measured.

What eager torch moves is counted as its operations are dispatched: each operand is read once an
operation, and what an operation writes is written. Kernels that take everything in one pass read
parameter, inputs and states, and write parameter and states.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .codecs import Codec
from .models import Case
from .protocol import TimedStep
from .rules import Row
from .workload import Workload

Make = Callable[[Workload, bool, float | None], TimedStep]
Count = Callable[[Workload, bool, bool], float]

# Written, but not read, in spite of being changed in place.
_OVERWRITTEN = {"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_"}
# Changed only where they are given a loss scale: torch then writes the unscaled gradient back.
_FUSED = "_fused_"


def itemsize(dtype: torch.dtype) -> int:
    """Return the bytes of an element."""
    return torch.empty((), dtype=dtype, device="meta").element_size()


def ideal(workload: Workload) -> float:
    """Return what one pass over everything moves."""
    codec = workload.codec
    param, gradient, state = map(itemsize, (codec.param, codec.gradient, codec.state))
    squares = 4 * workload.row.takes_squares
    gradient *= 1 + workload.row.takes_pairs
    return 2 * param + gradient + squares + 2 * state * len(workload.states)


def ours(workload: Workload, clip: bool, scaler: bool) -> float:
    """Count one pass, and one more read of the gradients where their norm is wanted.

    ``kernels/aot/update.py`` has the same numbers as budgets of the compiled kernels. The loss
    scaler's own search for an overflow reads and writes the gradients before the step.
    """
    gradient = itemsize(workload.codec.gradient)
    return ideal(workload) + gradient * (clip + 2 * scaler)


def one_pass(make: Make) -> Count:
    """Count one pass, with torch's clipping and unscaling in front of it.

    So does everybody who compiles the update or writes a kernel for it, a tensor or all tensors at
    a time. Clipping reads the gradients for the norm, then reads and writes them; unscaling reads
    and writes them.
    """

    def count(workload: Workload, clip: bool, scaler: bool) -> float:
        gradient = itemsize(workload.codec.gradient)
        return ideal(workload) + gradient * (3 * clip + 2 * scaler)

    return count


def eager(make: Make) -> Count:
    """Count what is dispatched in a step on a small tensor."""

    def count(workload: Workload, clip: bool, scaler: bool) -> float:
        return _dispatched(make, workload.codec, workload.row, workload.device, clip, scaler)

    return count


def one_pass_on_gpu(make: Make) -> Count:
    """Count one pass where a kernel takes it, and dispatched operations on a CPU."""
    on_gpu, on_cpu = one_pass(make), eager(make)

    def count(workload: Workload, clip: bool, scaler: bool) -> float:
        return (on_cpu if workload.device.type == "cpu" else on_gpu)(workload, clip, scaler)

    return count


@cache
def _dispatched(
    make: Make, codec: Codec, row: Row, device: torch.device, clip: bool, scaler: bool
) -> float:
    sizes = (1024, 3072)
    moved = []
    for size in sizes:
        small = Workload(Case("bytes_moved", "", ((size,),)), codec, row, device)
        timed = make(small, clip, 1.0 if scaler else None)
        small.new_gradients(seed=1, deviation=1.0)
        # Whatever is made in the first step is made.
        timed.step()
        with Counter() as counter:
            timed.step()
        moved.append(counter.bytes)
    # What does not grow with the tensor is not the parameters'.
    return (moved[1] - moved[0]) / (sizes[1] - sizes[0])


class Counter(TorchDispatchMode):
    """Counts the bytes that dispatched operations read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and count its operands."""
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if not function.is_view:
            self.bytes += _moved(function, args, kwargs, result)
        return result


def _moved(function: Any, args: Any, kwargs: Any, result: Any) -> int:
    schema = function._schema
    given = [*args, *([None] * (len(schema.arguments) - len(args)))]
    fused = schema.name.startswith(f"aten::{_FUSED}")
    total = 0
    written: set[int] = set()
    for argument, value in zip(schema.arguments, given, strict=True):
        value = kwargs.get(argument.name, value)
        tensors = [x for x in tree_leaves(value) if isinstance(x, Tensor)]
        size = sum(x.nbytes for x in tensors)
        writes = argument.alias_info is not None and argument.alias_info.is_write
        if fused and argument.name == "grads":
            writes = kwargs.get("grad_scale") is not None
        named = function._overloadpacket.__name__ in _OVERWRITTEN
        overwritten = argument.is_out or (writes and named)
        total += size * (writes + (not overwritten))
        if writes:
            written.update(id(x) for x in tensors)
    # Results that are no argument changed in place are new memory.
    made = (x for x in tree_leaves(result) if isinstance(x, Tensor) and id(x) not in written)
    return total + sum(x.nbytes for x in made)
