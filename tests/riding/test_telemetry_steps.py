"""``telemetry=Telemetry`` over steps: which are measured, and whose norms stay."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from marks import both_backends, numpy_may_warn
from norms_by_hand import bits, check, give, rows, same
from torch import Tensor, nn
from torch.amp import GradScaler

import fusedopt
from fusedopt import Telemetry

SHAPES = ((2051,), (3, 5), ())
either_count = pytest.mark.parametrize("capturable", [False, True])


def params_of(count: int = 3) -> list[nn.Parameter]:
    drawn = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=drawn)) for s in SHAPES[:count]]


def sgd(params: Any, telemetry: Telemetry | None, **options: Any) -> Any:
    return fusedopt.SGD(params, **{"lr": 0.5, **options}, telemetry=telemetry)


def take(optimizer: Any, params: list[nn.Parameter]) -> Tensor:
    """Take a step; return its norms by hand."""
    before = [p.detach().clone() for p in params]
    optimizer.step()
    return rows([p.grad for p in params], before, params)


@both_backends
@either_count
def test_every(backend: str, capturable: bool) -> None:
    """Steps 1, k + 1, 2 k + 1 are measured; norms of the latest of these stay meanwhile."""
    for every in (2, 3):
        params = params_of()
        telemetry = Telemetry(every=every)
        optimizer = sgd(params, telemetry, backend=backend, capturable=capturable)
        assert telemetry.every == every and not telemetry.measured
        last = torch.empty(0)
        for step in range(7):
            give(params, step, 1.0 + step)
            wanted = take(optimizer, params)
            assert telemetry.measured == (step % every == 0), step
            last = wanted if telemetry.measured else last
            check(telemetry.norms, last)


def test_steps_without_gradients_are_not_counted() -> None:
    params = params_of()
    telemetry = Telemetry(every=2)
    optimizer = sgd(params, telemetry)
    optimizer.step()
    assert not telemetry.measured
    for step in range(3):
        give(params, step)
        take(optimizer, params)
        assert telemetry.measured == (step != 1)
        optimizer.zero_grad()
        optimizer.step()
        assert not telemetry.measured


@both_backends
def test_what_was_read_stays_and_bits_are_repeated(backend: str) -> None:
    found = []
    for _ in range(2):
        params = params_of()
        telemetry = Telemetry()
        optimizer = sgd(params, telemetry, backend=backend)
        read, kept = [], []
        for step in range(3):
            give(params, step)
            optimizer.step()
            read.append(telemetry.norms)
            kept.append(read[-1].clone())
            assert torch.equal(read[-1], telemetry.norms)
        assert all(map(torch.equal, read, kept)) and not torch.equal(*read[:2])
        found.append(torch.stack(read))
    assert torch.equal(*(x.view(torch.int32) for x in found))


@both_backends
@either_count
def test_parameters_without_a_gradient(backend: str, capturable: bool) -> None:
    """Catches norms of a step before, and rows that move up."""
    params = params_of()
    telemetry = Telemetry()
    optimizer = sgd(params, telemetry, backend=backend, capturable=capturable)
    for step, without in enumerate((None, 0, 1, 2, None)):
        give(params, step)
        if without is not None:
            params[without].grad = None
        wanted = take(optimizer, params)
        assert wanted.isnan().any() == (without is not None)
        check(telemetry.norms, wanted)


@both_backends
@either_count
def test_overflows(backend: str, capturable: bool) -> None:
    """A skipped step leaves the norms of the last that was taken, also of other parameters."""
    params = params_of()
    telemetry = Telemetry()
    optimizer = sgd(params, telemetry, backend=backend, capturable=capturable)
    last = torch.full((3, 3), math.nan, dtype=torch.float64)
    for step, overflow in enumerate([True, False, True, True, False, True, False]):
        give(params, step, 1.0 + step)
        if step in (3, 5):
            params[1].grad = None
        optimizer.grad_scale = None
        optimizer.found_inf = torch.tensor(float(overflow))
        wanted = take(optimizer, params)
        assert telemetry.measured != overflow
        last = last if overflow else wanted
        if step:
            check(telemetry.norms, last)


@numpy_may_warn
@both_backends
@pytest.mark.parametrize("clip", [False, True])
def test_gradient_scaler(clip: bool, backend: str) -> None:
    """The gradient is without the loss scale; that of an overflow is not measured."""
    params = params_of()
    telemetry = Telemetry(every=2)
    norm = fusedopt.GlobalNorm(0.5) if clip else None
    optimizer = sgd(params, telemetry, clip=norm, backend=backend)
    optimizer.param_groups[0]["fused"] = True
    scaler = GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    last, taken = torch.empty(0), 0
    for step in range(7):
        give(params, step)
        gradients = [p.grad.clone() for p in params]
        for p in params:
            p.grad = scaler.scale(p.grad)
        if step in (2, 3):
            params[0].grad[-1] = math.inf
        before = [p.detach().clone() for p in params]
        scaler.step(optimizer)
        scaler.update()
        if step not in (2, 3):
            taken += 1
            assert telemetry.measured == (taken % 2 == 1), step
            last = rows(gradients, before, params) if telemetry.measured else last
        check(telemetry.norms, last)


@numpy_may_warn
@both_backends
@either_count
def test_guard(backend: str, capturable: bool) -> None:
    """A step that the guard leaves out keeps the norms of the last one that was taken.

    Also where it was one of other parameters, or the first of all.
    """
    params = params_of()
    telemetry = Telemetry()
    guard = fusedopt.SpikeGuard(3.0, 8, 2)
    optimizer = sgd(params, telemetry, guard=guard, backend=backend, capturable=capturable)
    last = torch.full((3, 3), math.nan, dtype=torch.float64)
    for step, scale in enumerate((math.nan, 1.0, 1.1, 0.9, 100.0, 90.0, math.nan, 1.0, 1.0)):
        give(params, step, scale)
        if step in (5, 8):
            params[1].grad = None
        wanted = take(optimizer, params)
        if step in (0, 4, 5, 6):
            # Counts on the host need to know of it.
            assert telemetry.measured == capturable
        else:
            last = wanted
        if step or capturable:
            check(telemetry.norms, last)
    assert guard.skipped == 4


@both_backends
def test_groups(backend: str) -> None:
    """Rows are in the order of the groups, whatever launches there are; one is added later."""
    params = params_of()
    telemetry = Telemetry()
    more = [nn.Parameter(torch.randn(4, dtype=torch.float64)), nn.Parameter(torch.ones(2, 2))]
    optimizer = sgd(
        [
            {"params": params[1:2], "lr": 0.1, "momentum": 0.9},
            {"params": more[:1], "capturable": True},
            {"params": [params[0]], "nesterov": False},
            {"params": [params[2]], "momentum": 0.5},
        ],
        telemetry,
        backend=backend,
    )
    order = [params[1], more[0], params[0], params[2]]
    for step in range(4):
        if step == 2:
            optimizer.add_param_group({"params": more[1:], "lr": 2.0})
            # Which had no step yet.
            assert telemetry.norms.isnan().all(1).tolist() == [False] * 4 + [True]
            order.append(more[1])
        give(order, step)
        wanted = take(optimizer, order)
        check(telemetry.norms, wanted)


@both_backends
def test_average(backend: str) -> None:
    """``WeightAverage`` beside it: neither changes the other."""
    found = []
    for telemetry in (None, Telemetry()):
        params = params_of()
        optimizer = fusedopt.AdamW(
            params, lr=0.5, average=fusedopt.WeightAverage(0.5), telemetry=telemetry,
            backend=backend,
        )  # fmt: skip
        for step in range(3):
            give(params, step)
            wanted = take(optimizer, params)
            if telemetry is not None:
                check(telemetry.norms, wanted)
        found.append(bits(optimizer, params))
    assert same(*found)
