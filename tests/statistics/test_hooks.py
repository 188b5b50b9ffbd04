"""Optimizers that step within backward, and conversions that swap what is in a parameter."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fusedopt


class Tied(nn.Module):
    """A weight that two layers share, and one behind an activation checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = (nn.Linear(4, 4) for _ in range(3))
        self.second.weight = self.first.weight

    def forward(self, x):
        x = self.second(self.first(x).tanh()).tanh()
        return checkpoint(self.last, x, use_reentrant=False)


def train(order, steps=3):
    """Step in hooks that are registered before or after the statistics, or not in hooks at all."""
    model = Tied().double()
    optimizers = {}

    def hook(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    if order == "hooks first":
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(hook)
    statistics = fusedopt.PerSampleSquares(model)
    if order in ("statistics first", "logged"):
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(hook)
    for p in model.parameters():
        optimizers[p] = fusedopt.BatchDecoupledAdam([p], lr=0.1, statistics=statistics)
    for step in range(steps):
        if order == "logged" and step == 1:
            for p in model.parameters():
                p.register_hook(lambda g: None)
        x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        model(x).square().sum(1).mean().backward()
        if order == "no hooks":
            for optimizer in optimizers.values():
                optimizer.step()
            for optimizer in optimizers.values():
                optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("order", ["hooks first", "statistics first", "logged"])
def test_steps_in_backward_are_steps_after_it(order):
    for a, b in zip(train(order), train("no hooks"), strict=True):
        assert torch.equal(a, b)


def test_autograd_grad_after_a_hook_adds_nothing():
    model = Tied().double()
    statistics = fusedopt.PerSampleSquares(model)
    x = torch.randn(3, 4, dtype=torch.float64)
    torch.autograd.grad(model(x).sum(), list(model.parameters()))
    assert statistics.samples == 0
    model(x).square().sum().backward()
    assert statistics.samples == 3


@pytest.mark.parametrize("cleared", [True, False])
@pytest.mark.parametrize("convert", [nn.Module.double, lambda m: m.to(torch.bfloat16)])
def test_a_conversion_by_swapped_tensors(convert, cleared):
    runs = []
    for swap in (False, True):
        torch.__future__.set_swap_module_params_on_conversion(swap)
        try:
            torch.manual_seed(0)
            model = nn.Linear(4, 2)
            statistics = fusedopt.PerSampleSquares(model)
            optimizer = fusedopt.BatchDecoupledAdam(model.parameters(), statistics=statistics)
            model(torch.randn(3, 4)).square().sum().backward()
            optimizer.step()
            if cleared:
                optimizer.zero_grad()
            convert(model)
            for _ in range(2):
                optimizer.zero_grad()
                x = torch.randn(3, 4).to(model.weight.dtype)
                model(x).square().sum().backward()
                optimizer.step()
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        runs.append([p.detach() for p in model.parameters()])
    assert all(map(torch.equal, *runs))


def test_each_missing_square_has_its_own_cause():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    model(x).sum().backward()
    statistics = fusedopt.PerSampleSquares(model)
    optimizer = fusedopt.BatchDecoupledAdam(model.parameters(), statistics=statistics)
    with pytest.raises(RuntimeError, match=r"0\.weight.*has not been called since"):
        optimizer.step()
    optimizer.zero_grad()
    model(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with statistics.paused():
        model(x).sum().backward()
    with pytest.raises(RuntimeError, match=r"0\.weight.*not of a call that was observed"):
        optimizer.step()


def test_a_weight_that_a_function_reads_is_named():
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(nn.functional.linear(x, self.inner.weight, self.inner.bias))

    model = Reads()
    statistics = fusedopt.PerSampleSquares(model)
    optimizer = fusedopt.BatchDecoupledAdam(model.parameters(), statistics=statistics)
    model(torch.randn(3, 4)).sum().backward()
    with pytest.raises(RuntimeError, match=r"inner\.weight.*reads it directly"):
        optimizer.step()


def test_an_unknown_parameter_is_a_new_one_or_anothers():
    model = nn.Sequential(nn.Linear(4, 2))
    statistics = fusedopt.PerSampleSquares(model)
    others = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match=r"functional_call.*paused\(\)"):
        torch.func.functional_call(model, others, (torch.randn(3, 4),)).sum().backward()
    model[0].weight = nn.Parameter(torch.randn(2, 4))
    with pytest.raises(RuntimeError, match=r"'0\.weight' was added.*make it anew"):
        model(torch.randn(3, 4)).sum().backward()
    statistics.remove()
