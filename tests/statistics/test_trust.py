"""What may be left over, set or run twice by others between two calls."""

from __future__ import annotations

import copy
import sys
from types import ModuleType

import pytest
import torch
from ranks import in_ranks
from torch import nn

import fusedopt
from fusedopt import BackpackSquares, GradSampleSquares, MicroBatchSquares, PerSampleSquares

# Differential privacy


@pytest.fixture
def engine(monkeypatch):
    """Stands for Opacus: what its optimizer leaves on parameters."""
    monkeypatch.setitem(sys.modules, "opacus", ModuleType("opacus"))

    def make_private(model):
        for p in model.parameters():
            p.summed_grad = None

    return make_private


def give_samples(model, kind):
    for p in model.parameters():
        p.grad = torch.ones_like(p)
        p.grad_sample = torch.ones(4, *p.shape)
        p.sum_grad_squared = torch.ones_like(p)
    if kind is PerSampleSquares:
        model.zero_grad()
        model(torch.ones(4, 3)).sum().backward()


SOURCES = {
    PerSampleSquares: lambda model: PerSampleSquares(model),
    GradSampleSquares: lambda model: GradSampleSquares(),
    MicroBatchSquares: lambda model: MicroBatchSquares(),
    BackpackSquares: lambda model: BackpackSquares(batch_size=4),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_no_source_gets_around_a_privacy_engine(engine, kind):
    model = nn.Linear(3, 2)
    statistics = SOURCES[kind](model)
    optimizer = fusedopt.BatchDecoupledAdam(model.parameters(), lr=0.1, statistics=statistics)

    def step():
        give_samples(model, kind)
        if kind is MicroBatchSquares:
            statistics.accumulate(optimizer)
        optimizer.step()
        optimizer.zero_grad()

    step()
    # In the middle of a run, with everything prepared.
    engine(model)
    before = copy.deepcopy(list(model.parameters()))
    with pytest.raises(RuntimeError, match=rf"\[0\].*privacy engine.*{kind.__name__}.*AdamW"):
        step()
    assert all(map(torch.equal, before, model.parameters()))


def test_plain_optimizers_and_svag_under_a_privacy_engine(engine):
    model = nn.Linear(3, 2)
    engine(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = model.weight.detach().clone()
    optimizer = fusedopt.AdamW(model.parameters(), lr=0.1, clip=fusedopt.GlobalNorm(1.0))
    optimizer.step()
    assert not torch.equal(model.weight, before)
    # Its held gradient is of before the noise.
    pair = fusedopt.SVAG(fusedopt.SGD(model.parameters(), lr=0.1), 2.0)
    pair.hold()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"\[0\].*privacy engine"):
        pair.step()


# Samples of an earlier step


@pytest.mark.parametrize("clear", ["none", "zeros", "another"])
def test_samples_of_an_earlier_step_are_not_used_again(clear):
    model = nn.Linear(3, 2)
    optimizer = fusedopt.BatchDecoupledAdam(model.parameters(), statistics=GradSampleSquares())
    give_samples(model, GradSampleSquares)
    optimizer.step()
    optimizer.step()  # the same gradient twice, as any optimizer takes it
    model.zero_grad(set_to_none=clear == "none")
    if clear == "another":
        for p in model.parameters():
            p.grad = torch.ones_like(p)
    if clear == "none":
        for p in model.parameters():
            p.grad_sample = [p.grad_sample, torch.ones(4, *p.shape)]
    before = copy.deepcopy(list(model.parameters()))
    with pytest.raises(RuntimeError, match=r"grad_sample.*earlier step.*optimizer\.zero_grad"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))
    optimizer.zero_grad()
    give_samples(model, GradSampleSquares)
    optimizer.step()


def test_backpacks_sums_of_an_earlier_step_are_not_used_again():
    model = nn.Linear(3, 2)
    statistics = BackpackSquares(batch_size=4)
    optimizer = fusedopt.BatchDecoupledAdam(model.parameters(), statistics=statistics)
    give_samples(model, BackpackSquares)
    optimizer.step()
    model.zero_grad()
    model(torch.ones(4, 3)).sum().backward()  # without the extension
    with pytest.raises(RuntimeError, match="sum_grad_squared.*earlier step"):
        optimizer.step()
    give_samples(model, BackpackSquares)
    optimizer.step()


def test_samples_without_gradients_may_be_set_again_and_again():
    """As users of torch.func do: p.grad is None throughout."""
    model = nn.Linear(3, 2)
    optimizer = fusedopt.BatchDecoupledAdam(model.parameters(), statistics=GradSampleSquares())
    for _ in range(3):
        for p in model.parameters():
            p.grad_sample = torch.randn(4, *p.shape)
        optimizer.step()


# Statistics that are set


def test_statistics_of_a_copy_are_attached():
    model = nn.Linear(3, 2)
    optimizer = fusedopt.BatchDecoupledAdam(model.parameters(), statistics=GradSampleSquares())
    model, optimizer = copy.deepcopy((model, optimizer))
    assert optimizer.statistics is None
    optimizer.statistics = GradSampleSquares()
    model.weight.grad = torch.ones(2, 3)
    model.bias.grad_sample = torch.randn(4, 2)
    with pytest.raises(RuntimeError, match="no grad_sample, unlike others"):
        optimizer.step()
    optimizer.zero_grad()
    assert model.bias.grad_sample is None


def test_statistics_that_are_replaced_are_let_go():
    model = nn.Linear(3, 2)
    first, second = GradSampleSquares(), GradSampleSquares()
    optimizer = fusedopt.BatchDecoupledAdam(model.parameters(), statistics=first)
    optimizer.statistics = second
    optimizer.statistics = second
    assert not first._all_parameters() and len(second._optimizers) == 1


def test_statistics_of_a_wrong_kind_are_refused():
    model = nn.Linear(3, 2)
    optimizer = fusedopt.BatchDecoupledAdam(model.parameters(), statistics=GradSampleSquares())
    with pytest.raises(TypeError, match="BatchDecoupledAdam.*PerSampleSquares"):
        optimizer.statistics = "squares"
    plain = fusedopt.AdamW(model.parameters())
    with pytest.raises(TypeError, match="AdamW does not use"):
        plain.statistics = GradSampleSquares()
    plain.statistics = None


# Several processes


def _reduce_twice(rank: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    statistics = PerSampleSquares(model)
    x = torch.randn(6, 3, dtype=torch.float64)[3 * rank : 3 * rank + 3]
    model(x).square().sum(1).mean().backward()
    for p in model.parameters():
        torch.distributed.all_reduce(p.grad)
        p.grad.div_(2)
    statistics.all_reduce()
    once = [statistics.mean_square(p) for p in model.parameters()]
    statistics.all_reduce()
    assert all(map(torch.equal, once, map(statistics.mean_square, model.parameters())))
    # A factor after the reduction is followed, too.
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer = fusedopt.BatchDecoupledAdam(model.parameters(), statistics=statistics)
    optimizer.step()
    optimizer.zero_grad()
    model(x).square().sum(1).mean().backward()
    statistics.all_reduce()
    assert statistics.samples == 6


def test_a_second_all_reduce_changes_nothing(tmp_path):
    in_ranks(2, tmp_path, _reduce_twice)
