"""Recurrent layers, and modules of unknown kind, where other sizes are the batch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from per_sample import gather, randn
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.func:UserWarning")

BATCH = 4


class Net(nn.Module):
    """A recurrent layer whose sequence and last states are all used."""

    def __init__(self, rnn: Any, states: bool = False, keywords: bool = False) -> None:
        super().__init__()
        self.rnn, self.states, self.keywords = rnn, states, keywords

    def forward(self, x: Tensor, *start: Tensor) -> Tensor:
        x = x if self.rnn.batch_first else x.transpose(0, 1)
        hx = None
        if start:
            hx = tuple(h.transpose(0, 1).contiguous() for h in start)
            hx = hx if isinstance(self.rnn, nn.LSTM) else hx[0]
        y, last = self.rnn(hx=hx, input=x) if self.keywords else self.rnn(x, hx)
        y = y if self.rnn.batch_first else y.transpose(0, 1)
        last = last if isinstance(last, tuple) else (last,)
        parts = [y, *(h.transpose(0, 1) for h in last)] if self.states else [y]
        return torch.cat([part.flatten(1) for part in parts], 1)


# Width of the input, hidden size, layers, bidirectional, length: each is the batch's size in turn.
SIZES = {
    "layers": (3, 5, 4, False, 6),
    "layers-times-directions": (3, 5, 2, True, 6),
    "hidden": (3, 4, 1, False, 6),
    "length": (3, 5, 1, False, 4),
    "input": (4, 5, 1, False, 6),
    "all": (4, 4, 2, True, 4),
}


@pytest.mark.parametrize("states", [False, True], ids=["sequence", "states-too"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch-first", "time-first"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_sizes_that_are_the_batch(
    device: torch.device, kind: Any, sizes: str, batch_first: bool, states: bool
) -> None:
    width, hidden, layers, both, length = SIZES[sizes]
    rnn = kind(width, hidden, layers, batch_first=batch_first, bidirectional=both)
    model = Net(rnn, states).to(device, torch.float64)
    gather(model, randn(BATCH, length, width), backend="reference")


@pytest.mark.parametrize("keywords", [False, True])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch-first", "time-first"])
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_given_states(device: torch.device, kind: Any, batch_first: bool, keywords: bool) -> None:
    """They are [layers, batch, width], whatever batch_first says."""
    rnn = kind(3, 4, 2, batch_first=batch_first, bidirectional=True)
    model = Net(rnn, True, keywords).to(device, torch.float64)
    starts = [randn(BATCH, 4, 4, seed=i) for i in range(2 if kind is nn.LSTM else 1)]
    gather(model, randn(BATCH, 4, 3), *starts, backend="reference")


def test_projected_states(device: torch.device) -> None:
    model = Net(nn.LSTM(3, 6, 2, proj_size=4, batch_first=True, bidirectional=True), True)
    gather(model.to(device, torch.float64), randn(BATCH, 4, 3), backend="reference")


def test_one_sample(device: torch.device) -> None:
    """Every size of one is the batch's."""
    model = Net(nn.GRU(3, 1, 1, batch_first=True), True).to(device, torch.float64)
    gather(model, randn(1, 1, 3), backend="reference")


class Turned(nn.Module):
    """Takes and returns time first, in a model that is batch first, and sums over time."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.scale).cumsum(0)


@pytest.mark.parametrize("length", [4, 5])
def test_second_candidate(device: torch.device, length: int) -> None:
    """The dimension where the batch is expected has its size and is not it."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Turned()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.transpose(0, 1)).transpose(0, 1)

    gather(Inner().to(device, torch.float64), randn(BATCH, length, 3), backend="reference")


def test_mixing_stays_an_error(device: torch.device) -> None:
    """No other reading of the dimensions makes up for it."""

    class Mixing(Turned):
        def forward(self, x: Tensor) -> Tensor:
            y = x * self.scale
            return y - y.mean((0, 1, 2))

    with pytest.raises(RuntimeError, match="mixes samples"):
        gather(Mixing().to(device, torch.float64), randn(3, 3, 3), backend="reference")
