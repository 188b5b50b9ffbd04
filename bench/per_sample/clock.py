"""Time on the device and memory at its peak."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Functions = Mapping[str, Callable[[], object]]


class Clock:
    """Times of a device, in milliseconds: what the device takes, and what the host takes to ask."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.flushes = 1
        if self.on_gpu:
            l2 = torch.cuda.get_device_properties(device).L2_cache_size
            self._buffer = torch.empty(max(4 * l2, 2**28), dtype=torch.int8, device=device)

    def hide(self, functions: Functions) -> None:
        """Choose how often to flush, so that the device is busy until the host has asked for all.

        Otherwise a short kernel's time would be that of the host that launches it.
        """
        if not self.on_gpu:
            return
        host = max(self.measure(function)[1] for function in functions.values())
        flush = min(self._elapsed(self._flush)[0] for _ in range(3)) / self.flushes
        self.flushes = max(1, min(100, math.ceil(1.5 * host / flush)))

    def measure(self, function: Callable[[], object]) -> tuple[float, float]:
        """Run a function with nothing of its operands in the cache."""
        if not self.on_gpu:
            begin = time.perf_counter()
            function()
            milliseconds = 1e3 * (time.perf_counter() - begin)
            return milliseconds, milliseconds
        torch.cuda.synchronize()
        self._flush()
        return self._elapsed(function)

    def _flush(self) -> None:
        for _ in range(self.flushes):
            self._buffer.zero_()

    def _elapsed(self, function: Callable[[], object]) -> tuple[float, float]:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        begin = time.perf_counter()
        function()
        host = 1e3 * (time.perf_counter() - begin)
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop), host


def in_turn(
    functions: Functions, clock: Clock, rounds: int, seconds: float, least: int = 3
) -> dict[str, list[tuple[float, float]]]:
    """Measure functions A B C A B C ..., so that a clock that drifts hits all.

    Args:
        functions: by name.
        clock: of their device.
        rounds: times that each is measured.
        seconds: after which a slow function is not measured again.
        least: times that it is measured whatever it takes.

    Returns:
        Times by name, on the device and on the host. The i-th of any two are of one round.
    """
    gc.collect()
    clock.hide(functions)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    spent = dict.fromkeys(functions, 0.0)
    for i in range(rounds):
        for name, function in functions.items():
            if i >= least and spent[name] > seconds:
                continue
            begin = time.perf_counter()
            # The allocator then holds blocks that fit, which the function before may have split.
            function()
            times[name].append(clock.measure(function))
            spent[name] += time.perf_counter() - begin
    return times


def summary(times: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Return all times of a function, with median and quartiles of the device's."""
    device = [on_device for on_device, _ in times]
    return {
        "milliseconds": device,
        "median": statistics.median(device),
        "quartiles": quartiles(device),
        "host_median": statistics.median(on_host for _, on_host in times),
    }


def ratio(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ratio of two summaries' medians, and the quartiles of that within a round."""
    # The slower may have been measured less often, always from the first round on.
    pairs = zip(ours["milliseconds"], theirs["milliseconds"], strict=False)
    return {
        "ratio": ours["median"] / theirs["median"],
        "ratio_quartiles": quartiles([a / b for a, b in pairs]),
    }


def quartiles(values: Sequence[float]) -> list[float]:
    """Return the first and the third quartile."""
    if len(values) < 2:
        return [*values, *values]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]


def release() -> None:
    """Give memory that nothing uses back to the GPU, if there is one."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def peak_bytes(function: Callable[[], object], device: torch.device) -> int | None:
    """Return what a function allocates at its peak, its results included; None without a GPU."""
    if device.type != "cuda":
        return None
    release()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = function()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak
