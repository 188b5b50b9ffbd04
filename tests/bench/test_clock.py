"""Times of a device, on one that is only played: its queue, its events, and a host that waits."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

# bench is not installed. Last, so that it hides nothing that is.
sys.path.append(str(Path(__file__).resolve().parents[2]))

GPU = torch.device("cuda")
FLUSH = 0.1


class Device:
    """Milliseconds of a host, and of a device that does what it is asked for in order."""

    def __init__(self) -> None:
        self.host = self.busy_until = 0.0

    def ask(self, milliseconds: float, launching: float = 0.01) -> None:
        self.host += launching
        self.busy_until = max(self.busy_until, self.host) + milliseconds

    def wait(self) -> None:
        self.host = max(self.host, self.busy_until)


class Event:
    device: Device

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = max(self.device.busy_until, self.device.host)

    def synchronize(self) -> None:
        self.device.host = max(self.device.host, self.at)

    def elapsed_time(self, later: Event) -> float:
        return later.at - self.at


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Event.device = Device()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", device.wait)
    properties = SimpleNamespace(L2_cache_size=50 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    return device


@pytest.fixture
def clock(device: Device, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    clock = importlib.import_module("bench.harness.clock")
    buffer = SimpleNamespace(zero_=lambda: device.ask(FLUSH, 0.001))
    monkeypatch.setattr(clock.torch, "empty", lambda *_, **__: buffer)
    played = SimpleNamespace(perf_counter=lambda: device.host / 1e3)
    monkeypatch.setattr(clock, "time", played)
    return clock


def launching(device: Device, count: int) -> Callable[[], None]:
    def step() -> None:
        for _ in range(count):
            device.ask(0.002)

    return step


def test_the_launches_are_hidden_behind_the_flushes(clock: ModuleType, device: Device) -> None:
    step = launching(device, 100)
    watch = clock.Clock(GPU)
    # The host takes five times as long as the device, and one flush as long as ten launches.
    assert watch.measure(step)[0] == pytest.approx(1.0, rel=0.2)
    watch.hide({"step": step})
    assert watch.flushes == 15
    assert watch.measure(step) == pytest.approx((0.2, 1.0))


def test_a_host_that_waits_for_the_step_does_not_wait_for_the_flushes(
    clock: ModuleType, device: Device
) -> None:
    def step() -> None:
        device.ask(0.5)
        # As a loss scaler reads whether there was an overflow.
        device.wait()
        device.ask(0.5)

    watch = clock.Clock(GPU)
    watch.flushes = 100
    on_device, on_host = watch.measure(step)
    assert on_host == pytest.approx(0.52)
    assert on_device == pytest.approx(1.0, abs=0.02)
