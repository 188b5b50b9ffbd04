"""One parameter owned by modules of different kinds: one contribution a sample, squared once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from per_sample import BACKENDS, DTYPES, gather, randint, randn, squared_error, to
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from fusedopt import PerSampleSquares
from fusedopt.statistics.per_sample import reduce as joint

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.func:UserWarning")


class Head(nn.Module):
    """Registers its child's bias as its own, and never reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(4, 5)
        self.bias = self.decoder.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.tanh(x))


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 2.0


class Tied(nn.Module):
    """A scaled embedding and its head; in float32 by other ways of making the gradient."""

    def __init__(self, kind: Any = Scaled, twice: bool = False) -> None:
        super().__init__()
        self.embedding = kind(5, 4, padding_idx=1)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embedding.weight
        self.twice = twice

    def forward(self, ids: Tensor) -> Tensor:
        y = self.head(torch.tanh(self.embedding(ids)))
        if self.twice:
            y = y + self.head(torch.cos(self.embedding(ids.flip(1))))
        return y


class Product(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight)


class Squared(Product):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.square()


class LinearFirst(nn.Module):
    """A known layer, then a custom module with its weight and bias, then the layer again."""

    def __init__(self) -> None:
        super().__init__()
        self.known = nn.Linear(4, 4)
        self.custom = Product(self.known.weight)
        self.norm = nn.LayerNorm(4)
        self.norm.bias = self.known.bias
        self.shift = Shift(self.known.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.known(self.norm(self.shift(self.custom(self.known(x)))))


class Shift(nn.Module):
    def __init__(self, bias: nn.Parameter) -> None:
        super().__init__()
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.cos(self.bias)


class TwoCustom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Product(nn.Parameter(torch.randn(4, 4)))
        self.second = Squared(self.first.weight)
        self.own = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self.second(self.first(x)) + self.first(x * 2))


class ParentToo(nn.Module):
    """Reads its child's weight under two names, and calls the child."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(4, 4)
        self.weight = self.child.weight
        self.again = self.child.weight
        self.gain = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.child(x)), self.weight) * self.gain + x @ self.again


class GainAndTable(nn.Module):
    """Known layers of kinds that have nothing in common."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.norm = nn.LayerNorm((3, 4))
        self.norm.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))


class ConvolutionToo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, 4, 3, padding=1, groups=2)
        self.second = Kernel(self.first.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Kernel(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, torch.sin(self.weight), groups=2)


MODELS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "alias": lambda: (Head(), randn(3, 6, 4)),
    "scaled-tied": lambda: (Tied(), randint(5, 3, 6)),
    "scaled-tied-twice": lambda: (Tied(twice=True), randint(5, 3, 6)),
    "known-first": lambda: (LinearFirst(), randn(3, 6, 4)),
    "two-custom": lambda: (TwoCustom(), randn(3, 6, 4)),
    "parent-too": lambda: (ParentToo(), randn(3, 6, 4)),
    "gain-and-linear": lambda: (GainAndTable(), randn(5, 3, 4)),
    "convolution-too": lambda: (ConvolutionToo(), randn(3, 4, 6)),
    "one-sample": lambda: (Tied(), randint(5, 1, 6)),
    "as-many-samples-as-tokens": lambda: (LinearFirst(), randn(4, 4, 4)),
}
each_model = pytest.mark.parametrize("name", MODELS)


@pytest.mark.parametrize("backend", BACKENDS)
@each_model
def test_contributions_are_added_before_they_are_squared(name: str, backend: str) -> None:
    model, x = to(DTYPES[backend], *MODELS[name]())
    gather(model, x, backend=backend, tolerance=None if backend == "reference" else 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@each_model
def test_accumulation(name: str, backend: str) -> None:
    """Squares of two batches add up, their contributions do not."""
    model, x = to(DTYPES[backend], *MODELS[name]())
    batches = [(x,), (x.flip(1),)]
    tolerance = None if backend == "reference" else 1e-4
    gather(model, batches=batches, reduction="sum", backend=backend, tolerance=tolerance)


@each_model
def test_pieces_of_one_sample(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint, "CHUNK_ELEMENTS", 1)
    model, x = to(torch.float64, *MODELS[name]())
    gather(model, x, backend="reference")


@each_model
def test_gradients_are_those_without_statistics(name: str) -> None:
    """Made once: neither lost nor doubled where one way meets another."""
    model, x = to(torch.float64, *MODELS[name]())
    plain = copy.deepcopy(model)
    PerSampleSquares(model, backend="reference")
    for m in (plain, model):
        squared_error()(m(x)).sum().backward()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-13, atol=1e-13)
