"""BackPACK: its sums of squares feed the optimizer."""

from __future__ import annotations

import pytest
import torch
from clients import ADAMW, OUT, WIDTH, assert_same, batches, loss_of, values
from torch import nn

import fusedopt

backpack = pytest.importorskip("backpack")

STEPS, BATCH = 6, 8


def _network() -> nn.Sequential:
    """Of layers that BackPACK knows."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 7), nn.Tanh(), nn.Linear(7, OUT))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("virtual", [1, 3, BATCH])
def test_sums_of_squares(virtual: int, reduction: str, parts: int) -> None:
    """As our own squares of samples; with the real batch as the virtual one, as AdamW."""
    from backpack.extensions import SumGradSquared

    model, plain = backpack.extend(_network()), _network()
    criterion = backpack.extend(nn.MSELoss(reduction=reduction))
    statistics = fusedopt.BackpackSquares(loss_reduction=reduction, batch_size=BATCH // parts)
    optimizer = fusedopt.BatchDecoupledAdam(
        model.parameters(), **ADAMW.own, statistics=statistics, virtual_batch_size=virtual
    )
    if virtual == BATCH:
        own: torch.optim.Optimizer = torch.optim.AdamW(plain.parameters(), **ADAMW.options)
    else:
        own = fusedopt.BatchDecoupledAdam(
            plain.parameters(),
            **ADAMW.own,
            statistics=fusedopt.PerSampleSquares(plain),
            virtual_batch_size=virtual,
        )
    # A batch's loss in parts: their mean, or their sum.
    share = 1 / parts if reduction == "mean" else 1.0
    for x, y in batches(STEPS, BATCH):
        optimizer.zero_grad()
        for part, target in zip(x.chunk(parts), y.chunk(parts), strict=True):
            with backpack.backpack(SumGradSquared()):
                (criterion(model(part), target) * share).backward()
            if parts > 1:
                statistics.accumulate(optimizer)
        optimizer.step()
        own.zero_grad()
        # Adam does not see the size of the gradient: the mean of samples, whatever their loss.
        loss_of(plain, x, y).mul(1.0 if reduction == "mean" else OUT).backward()
        own.step()
    assert_same(values(model), values(plain), _start(), atol=1e-5)


def _start() -> list[torch.Tensor]:
    return values(_network())
