"""Lion and schedule-free AdamW beside the packages of their authors and of others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt

CLOSE = {"rtol": 1e-11, "atol": 1e-12}


def _params() -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(s, generator=generator).double()) for s in ((7, 3), (5,))]


def _step(optimizer: Any, params: list[Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(10 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).double() * (1 + step % 3)
    optimizer.step()


def _values(params: list[Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_schedule_free(warmup: int, decay: float) -> None:
    # Both modes, at the same calls. Catches other defaults, and a decay at another point.
    schedulefree = pytest.importorskip("schedulefree")
    runs = []
    for cls in (fusedopt.ScheduleFreeAdamW, schedulefree.AdamWScheduleFree):
        params = _params()
        optimizer = cls(params, warmup_steps=warmup, weight_decay=decay)
        seen = []
        for step in range(8):
            optimizer.train()
            _step(optimizer, params, step)
            seen += _values(params)
            optimizer.eval()
            seen += _values(params)
        runs.append(seen)
    torch.testing.assert_close(*runs, **CLOSE)


def test_lion() -> None:
    lion = pytest.importorskip("lion_pytorch")
    runs = []
    for cls in (fusedopt.Lion, lion.Lion):
        params = _params()
        optimizer = cls(params, lr=0.02, betas=(0.8, 0.95), weight_decay=0.3)
        for step in range(8):
            _step(optimizer, params, step)
        runs.append(_values(params))
    torch.testing.assert_close(*runs, **CLOSE)
