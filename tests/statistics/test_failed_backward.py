"""A backward pass that fails takes nothing from those after it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fusedopt


class Fails(torch.autograd.Function):
    on = False

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if Fails.on:
            raise MemoryError("of a batch that was too large")
        return gradient


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.second(Fails.apply(self.first(x)))


def test_clipping_by_hand_after_a_backward_pass_that_failed(monkeypatch):
    """Gradients had arrived by then, whose norms would have been taken at its end."""
    runs = []
    for failing in (False, True):
        model = Model()
        statistics = fusedopt.PerSampleSquares(model)
        optimizer = fusedopt.BatchDecoupledAdam(model.parameters(), statistics=statistics)
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
        if failing:
            monkeypatch.setattr(Fails, "on", True)
            with pytest.raises(MemoryError):
                model(x).square().sum().backward()
            monkeypatch.setattr(Fails, "on", False)
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
        runs.append([p.detach() for p in model.parameters()])
    assert all(map(torch.equal, *runs))
