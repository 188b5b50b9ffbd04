"""Models to observe, and a step of theirs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from per_sample import squared_error
from torch import Tensor, nn

from fusedopt import BatchDecoupledAdam

# torch's compiler reads .grad of whatever crosses a graph break, and torch warns of that.
graph_breaks = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


class Everything(nn.Module):
    """A layer of each supported kind, tied embedding and head, and one module twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm1, self.norm2 = nn.LayerNorm(4), nn.RMSNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.twice = nn.Linear(4, 4)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.group = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = self.twice(torch.tanh(self.twice(self.norm2(x))))
        x = self.group(torch.tanh(self.conv(x.transpose(1, 2)))).transpose(1, 2)
        return self.head(x)


def adam_over(params: Any, statistics: Any, **options: Any) -> BatchDecoupledAdam:
    arguments = {"lr": 0.1, "betas": (0.6, 0.8), **options}
    arguments.setdefault("backend", "reference")  # "auto" is the slow interpreter in these tests
    return BatchDecoupledAdam(params, statistics=statistics, **arguments)


def adam_of(model: nn.Module, statistics: Any, **options: Any) -> BatchDecoupledAdam:
    return adam_over(model.parameters(), statistics, **{"virtual_batch_size": 2, **options})


def adam_without_decay(params: Any, statistics: Any, **options: Any) -> BatchDecoupledAdam:
    return adam_over(params, statistics, **{"weight_decay": 0.0, **options})


def pass_of(model: nn.Module, x: Tensor, loss: Any = None) -> None:
    (loss or squared_error())(model(x)).sum().backward()


def clones(tensors: Any) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def untouched(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)
