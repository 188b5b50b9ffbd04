"""How this library hands work to Triton: one function, and what a launch asks of a device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

from . import lang
from .lang import COMPILE_OPTIONS, EXACT_OPTIONS, INTERPRETED, register_options, tl, triton

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
    torch.int16: tl.int16,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
    # As patterns: not every device has the type.
    torch.float8_e4m3fn: tl.uint8,
}


def launch(
    kernel: Any,
    programs: int,
    threads: int,
    device: torch.device,
    *arguments: Any,
    registers: Any = None,
    exact: Any = False,
    **meta: Any,
) -> None:
    """Launch a kernel: the one place where this library hands work to Triton.

    Args:
        kernel: the ``@jit`` function.
        programs: how many there are.
        threads: of each.
        device: that the tensors are on.
        arguments: of the kernel.
        registers: of a thread, at most; None for any.
        exact: whether each operation is rounded by itself.
        meta: the kernel's compile-time arguments.
    """
    settle(kernel)
    with _device_guard(device):
        warps = threads // warp_size(device)
        limit = register_options(registers, compiler(device))
        options = EXACT_OPTIONS if exact else COMPILE_OPTIONS
        kernel[(programs,)](*arguments, num_warps=warps, **options, **limit, **meta)


def compiler(device: torch.device) -> str:
    """Name Triton's backend for a device: ``cuda``, ``hip``, or nothing for the interpreter."""
    if device.type != "cuda":
        return ""
    return "cuda" if torch.version.hip is None else "hip"


@cache
def warp_size(device: torch.device) -> int:
    """Threads that run in step: a wavefront of AMD's has 64."""
    if device.type != "cuda":
        return 32
    return int(torch.cuda.get_device_properties(device).warp_size)


def device_architecture(device: torch.device) -> str:
    """Name what Triton compiles for, as ``codegen`` takes it; nothing for the interpreter."""
    if INTERPRETED:
        return ""
    with _device_guard(device):
        target = triton.runtime.driver.active.get_current_target()
    return f"{target.backend}:{target.arch}"


def _device_guard(device: torch.device) -> AbstractContextManager[Any]:
    # Triton launches on the current device, which need not be the tensors'.
    if device.type == "cpu":
        return nullcontext()
    guard: AbstractContextManager[Any] = torch.get_device_module(device).device(device)
    return guard


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
