"""What step() costs the host: 1,000 parameters of 16 elements, the launch itself stubbed out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import pytest
import torch

import fusedopt
from bench.harness.pairs import make_params, ratio, without_launches
from fusedopt.backends import triton_coefficients

SHAPES = [(16,)] * 1000


def _torch_fused() -> torch.optim.Optimizer:
    return torch.optim.AdamW(make_params(SHAPES), fused=True)


def _fusedopt() -> torch.optim.Optimizer:
    return fusedopt.AdamW(make_params(SHAPES), backend="triton")


@pytest.fixture
def launches() -> Iterator[list[int]]:
    """Replace the launch by a record of how many programs it would have run."""
    with without_launches() as programs:
        yield programs


@pytest.mark.parametrize("make", [_torch_fused, _fusedopt])
@pytest.mark.benchmark(group="host time of AdamW.step(), 1,000 parameters of 16 elements")
def test_step(benchmark, launches, make):
    optimizer = make()
    optimizer.step()
    benchmark(optimizer.step)


def test_at_most_half_of_torch_fused(launches):
    ours, theirs = _fusedopt(), _torch_fused()
    measured = ratio(ours.step, theirs.step, rounds=60)
    print(f"\nhost time of step(), fusedopt over torch fused: {measured:.3f}")
    assert launches == [1000] * 61, "the step that was timed must be one launch of everything"
    assert measured <= 0.5


def test_new_gradients_cost_little(launches):
    """Gradients at new addresses every step, as after zero_grad(set_to_none=True)."""
    ours, theirs = _fusedopt(), _torch_fused()
    sets = [[torch.randn(16) for _ in SHAPES] for _ in range(2)]
    turn = {"ours": 0, "theirs": 0}

    def step(name: str, optimizer: torch.optim.Optimizer) -> None:
        turn[name] += 1
        gradients = sets[turn[name] % 2]
        for p, gradient in zip(optimizer.param_groups[0]["params"], gradients, strict=True):
            p.grad = gradient
        optimizer.step()

    measured = ratio(lambda: step("ours", ours), lambda: step("theirs", theirs), rounds=40)
    print(f"\nhost time of step() with moved gradients, fusedopt over torch fused: {measured:.3f}")
    assert measured <= 0.8


@pytest.mark.parametrize("capturable", [False, True])
def test_a_group_for_each_parameter(launches, capturable, monkeypatch):
    """1,000 groups under a schedule, as multipliers of lr by parameter have them."""
    # What the device does is left out here, too.
    monkeypatch.setattr(triton_coefficients, "launch", lambda *_, **__: None)
    params, theirs = make_params(SHAPES), make_params(SHAPES)
    ours = fusedopt.AdamW(
        [{"params": [p]} for p in params], backend="triton", capturable=capturable
    )
    other = torch.optim.AdamW([{"params": [p]} for p in theirs], fused=True)

    def step(optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            group["lr"] *= 0.999
        optimizer.step()

    spent: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(40):
        for name, optimizer in (("ours", ours), ("theirs", other)):
            start = time.thread_time()
            step(optimizer)
            spent[name].append(time.thread_time() - start)
    # The first makes states and plans.
    each = {who: 1e3 * statistics.median(times[1:]) for who, times in spent.items()}
    print(f"\nhost time, 1,000 groups: {each['ours']:.1f} ms, torch fused {each['theirs']:.1f} ms")
    assert launches == [1000] * 40
    assert each["ours"] <= 2 * each["theirs"]


def test_released_parameters_one_by_one(launches):
    """A released parameter, beside an optimizer of torch's for each."""
    ours, theirs = _fusedopt(), make_params(SHAPES)
    own = ours.param_groups[0]["params"]
    release = fusedopt.gradient_release(torch.nn.ParameterList(own), ours)
    (hooks,) = zip(*(p._post_accumulate_grad_hooks.values() for p in own), strict=True)
    single = [torch.optim.AdamW([p], fused=True) for p in theirs]
    spent: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(20):
        for p in (*own, *theirs):
            p.grad = torch.randn(16)
        start = time.thread_time()
        with torch.no_grad():
            for hook, p in zip(hooks, own, strict=True):
                hook(p)
        spent["ours"].append(time.thread_time() - start)
        start = time.thread_time()
        for optimizer, p in zip(single, theirs, strict=True):
            optimizer.step()
            p.grad = None
        spent["theirs"].append(time.thread_time() - start)
    # The first makes states and plans.
    each = {who: 1e6 * min(times[1:]) / len(SHAPES) for who, times in spent.items()}
    print(f"\nprocessor time a parameter: {each['ours']:.1f} us, torch's {each['theirs']:.1f} us")
    release.remove()
    assert len(launches) == 20 * len(SHAPES)
    assert each["ours"] <= 2 * each["theirs"]
