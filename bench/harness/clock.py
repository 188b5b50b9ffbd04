"""Time on the device, memory at its peak, and the bandwidth of a copy."""

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
        # Twice, since the first call may have to wait for new memory.
        host = max(min(self._host(f) for _ in range(2)) for f in functions.values())
        flush = min(self._elapsed(self._flush) for _ in range(3)) / self.flushes
        self.flushes = max(1, min(100, math.ceil(1.5 * host / flush)))

    def measure(self, function: Callable[[], object]) -> tuple[float, float]:
        """Run a function twice, the second time with nothing of its operands in the cache.

        The allocator then holds blocks that fit, which the function before may have split.
        """
        if not self.on_gpu:
            function()
            milliseconds = _seconds(function) * 1e3
            return milliseconds, milliseconds
        # Not behind the flushes: whoever asks for a value, or fills the queue of launches, would
        # wait for them.
        host = self._host(function)
        torch.cuda.synchronize()
        self._flush()
        return self._elapsed(function), host

    def _host(self, function: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        return _seconds(function) * 1e3

    def _flush(self) -> None:
        for _ in range(self.flushes):
            self._buffer.zero_()

    def _elapsed(self, function: Callable[[], object]) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)


def _seconds(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def in_turn(
    functions: Functions,
    clock: Clock,
    rounds: int,
    seconds: float,
    least: int = 3,
    before: Callable[[], object] = lambda: None,
) -> dict[str, list[tuple[float, float]]]:
    """Measure functions A B C A B C ..., so that a clock that drifts hits all.

    Args:
        functions: by name.
        clock: of their device.
        rounds: times that each is measured.
        seconds: after which a slow function is not measured again.
        least: times that it is measured whatever it takes.
        before: called before each round, outside of all times.

    Returns:
        Times by name, on the device and on the host. The i-th of any two are of one round.
    """
    gc.collect()
    clock.hide(functions)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    spent = dict.fromkeys(functions, 0.0)
    for i in range(rounds):
        before()
        for name, function in functions.items():
            if i >= least and spent[name] > seconds:
                continue
            begin = time.perf_counter()
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


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return median, and the tenths below and above which a tenth of the values lie."""
    if len(values) < 2:
        return dict.fromkeys(("median", "p10", "p90"), values[0])
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return {"median": statistics.median(values), "p10": tenths[0], "p90": tenths[-1]}


def ratio(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return median and quartiles of the ratio of two summaries' times within a round."""
    # The slower may have been measured less often, always from the first round on.
    pairs = zip(ours["milliseconds"], theirs["milliseconds"], strict=False)
    ratios = [a / b for a, b in pairs]
    return {"ratio": statistics.median(ratios), "ratio_quartiles": quartiles(ratios)}


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


class Copy:
    """A device copy, the most that a kernel which does nothing but move memory can reach.

    Args:
        device: of the memory.
        size: bytes of the source; read and written are twice as many.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        self.device, self.bytes = device, size

    def gbps(self, clock: Clock, rounds: int = 20) -> list[float]:
        """Return GB/s of several copies, read and written bytes both counted."""
        source = torch.ones(self.bytes, dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        times = [clock.measure(lambda: target.copy_(source))[0] for _ in range(rounds)]
        return [2 * self.bytes / (1e6 * t) for t in times]
