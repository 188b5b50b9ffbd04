"""Steps that repeat bit for bit, and how many launches one takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract import (
    ADAMW,
    DEVICE,
    Case,
    assert_same_bits,
    each_case,
    each_class,
    each_class_on_backends,
    groups_of,
    new_params,
    set_gradients,
    snapshot,
)
from torch.optim import Optimizer

import fusedopt


@each_class_on_backends
def test_reruns_give_the_same_bits(case: Case, backend: str) -> None:
    runs = []
    for _ in range(2):
        params = new_params()
        clip = fusedopt.GlobalNorm(0.5)
        optimizer = case.ours(params, **case.options, clip=clip, backend=backend)
        for seed in range(1, 5):
            set_gradients(params, seed)
            optimizer.step()
        runs.append([snapshot(optimizer), clip.last.clone()])
    assert_same_bits(*runs)


class _Launches:
    """Stands in for the launch: counts, and runs nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from fusedopt.backends import triton

        self.count = 0
        monkeypatch.setattr(triton, "launch", self)

    def __call__(self, *arguments: Any, **meta: Any) -> None:
        self.count += 1

    def of(self, optimizer: Optimizer) -> int:
        self.count = 0
        optimizer.step()
        return self.count


def _many(dtypes: tuple[torch.dtype, ...]) -> list[dict[str, Any]]:
    shapes = [(3,), (2, 5), (1030,), ()]
    params = [
        torch.nn.Parameter(torch.zeros(shapes[i % 4], dtype=dtypes[i % len(dtypes)], device=DEVICE))
        for i in range(1000)
    ]
    for p in params:
        p.grad = torch.ones_like(p)
    cuts = [params[:300], params[300:700], params[700:]]
    return [
        {"params": cut, "lr": lr, "weight_decay": decay}
        for cut, lr, decay in zip(cuts, (0.1, 0.2, 0.3), (0.0, 0.1, 0.2), strict=True)
    ]


@each_case
def test_a_thousand_tensors_in_three_groups_are_one_launch(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = _Launches(monkeypatch)
    optimizer = case.ours(_many((torch.float32,)), **case.options, backend="triton")
    assert [launches.of(optimizer) for _ in range(3)] == [1, 1, 1]
    for p in groups_of(optimizer)[::3]:  # these now are a step behind the others
        p.grad = None
    assert launches.of(optimizer) == 1
    for p in groups_of(optimizer):
        p.grad = torch.ones_like(p)
    assert [launches.of(optimizer) for _ in range(2)] == [1, 1]


@each_class
def test_mixed_types_are_one_launch_each(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = _Launches(monkeypatch)
    types = (torch.float32, torch.bfloat16, torch.float16)
    for count in (2, 3):
        optimizer = case.ours(_many(types[:count]), **case.options, backend="triton")
        assert [launches.of(optimizer) for _ in range(2)] == [count, count]


def test_clipping_adds_one_launch_for_each_type_and_one_for_the_factor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launches = _Launches(monkeypatch)
    clip = fusedopt.GlobalNorm(1.0)
    groups = _many((torch.float32, torch.bfloat16))
    optimizer = ADAMW.ours(groups, **ADAMW.options, clip=clip, backend="triton")
    assert launches.of(optimizer) == 2 + 1 + 2
