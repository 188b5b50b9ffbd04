"""A fake driver of a GPU: Triton compiles for it, and launches nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .. import backends
from ..kernels import aot
from ..kernels import launch as launching
from ..kernels.per_sample.linear import has_tf32
from ..statistics.ops import tiles

# Of an H100. It decides how many programs share a sum, and whether they do: what a case depends on
# of that it states itself.
PROCESSORS = 132


class NoLauncher:
    """Stands in for what starts a compiled kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        """Start nothing."""


class _Utilities:
    """Stands in for the module that loads machine code."""

    def get_device_properties(self, device: Any) -> dict[str, int]:
        return {"max_shared_mem": 2**31 - 1}

    def load_binary(self, *arguments: Any) -> tuple[Any, Any, int, int, int]:
        # Module, function, registers, spilled registers, threads that a program may have.
        return None, None, 0, 0, 2**16


class FakeDriver:
    """What a launch asks of a driver, answered for a target.

    Args:
        target: Triton's, as ``aot.parse_target`` returns it.
        launcher: made for each kernel, with its source and metadata, and called to start it.
    """

    def __init__(self, target: Any, launcher: type = NoLauncher) -> None:
        self.target = target
        self.utils = _Utilities()
        self.launcher_cls = launcher

    def get_current_target(self) -> Any:
        """Return the target."""
        return self.target

    def get_current_device(self) -> str:
        """Name the device; by it launchers remember, in this process, what is compiled."""
        return f"fake driver for {aot.architecture(self.target)}"

    def get_current_stream(self, device: Any) -> int:
        """Return the default stream."""
        return 0


@contextmanager
def fake_driver(target: Any, launcher: type = NoLauncher) -> Iterator[None]:
    """Let tensors of the CPU pass for tensors on a target, and launch nothing.

    Args:
        target: Triton's, as ``aot.parse_target`` returns it.
        launcher: as for ``FakeDriver``.
    """
    from triton.runtime import driver

    # Not reset_active(): without a GPU there is no driver to go back to.
    previous = getattr(driver, "_active", None)
    driver.set_active(FakeDriver(target, launcher))
    undo = [_replace(original, answer) for original, answer in _answers(target)]
    try:
        yield
    finally:
        for put_back in undo:
            put_back()
        driver.set_active(previous)


def _answers(target: Any) -> Iterator[tuple[Callable[..., Any], Callable[..., Any]]]:
    """Yield the functions that ask a device for facts, each with an answer for the target."""
    fastest = "tf32" if has_tf32(target.arch if target.backend == "hip" else None) else "ieee"
    yield backends._triton_runs_on, lambda device: (True, "a fake driver")
    yield launching.warp_size, lambda device: target.warp_size
    yield launching.compiler, lambda device: target.backend
    yield tiles.capability, lambda device: aot.capability(target)
    yield tiles.processors, lambda device: PROCESSORS
    yield tiles.fastest_precision, lambda device: fastest


def _replace(original: Callable[..., Any], answer: Callable[..., Any]) -> Callable[[], None]:
    """Replace a function of this package in every module that has imported it."""
    places = [
        (module, name)
        for module_name, module in list(sys.modules.items())
        if module_name.partition(".")[0] == "fusedopt"
        for name, value in list(vars(module).items())
        if value is original
    ]
    for module, name in places:
        setattr(module, name, answer)

    def put_back() -> None:
        for module, name in places:
            setattr(module, name, original)

    return put_back
