"""Normalisations of models' own: recognised by what they compute, and held to it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from marks import both_backends
from per_sample import DTYPES, assert_near, gather, randn, squared_error, to
from torch import Tensor, nn

from fusedopt import PerSampleSquares


class Own(nn.Module):
    """RMSNorm as families of language models write it."""

    def __init__(self, width: int = 6, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))
        self.bias = nn.Parameter(torch.randn(width)) if bias else None
        self.variance_epsilon = 1e-6

    def normal(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def forward(self, hidden_states: Tensor) -> Tensor:
        y = self.normal(hidden_states) * self.weight
        return y if self.bias is None else y + self.bias


class Narrow(Own):
    """In float32, whatever comes in."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * self.normal(x.to(torch.float32)).to(x.dtype)


class FromOne(Own):
    def forward(self, x: Tensor) -> Tensor:
        return self.normal(x) * (1.0 + self.weight)


class Centred(Own):
    def normal(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return super().normal(x)


class ScaledFirst(Own):
    def forward(self, x: Tensor) -> Tensor:
        return self.normal(x * (1.0 + self.weight))


class Gated(Own):
    def forward(self, x: Tensor) -> Tensor:
        return self.normal(x) * self.weight * torch.sigmoid(x)


class Dropping(Own):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5)


class LongOnes(Own):
    """Another layer where inputs are long."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[1] < 20 else x * self.weight


def model_of(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), norm, nn.Tanh(), nn.Linear(6, 2))


KNOWN: dict[str, Any] = {
    "own": Own, "bias": lambda: Own(bias=True), "narrow": Narrow, "from-one": FromOne,
    "centred": Centred, "centred-bias": lambda: Centred(bias=True),
}  # fmt: skip


@both_backends
@pytest.mark.parametrize("name", KNOWN)
def test_known(name: str, backend: str) -> None:
    dtype = torch.float32 if name == "narrow" else DTYPES[backend]
    model, x = to(dtype, model_of(KNOWN[name]()), randn(3, 5, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gather(model, x, backend=backend)


def test_used_twice_and_frozen() -> None:
    norm = Own(bias=True)
    model, x = to(
        torch.float64, nn.Sequential(nn.Linear(4, 6), norm, nn.Tanh(), norm), randn(3, 5, 4)
    )
    gather(model, x).remove()
    norm.bias.requires_grad_(False)
    gather(nn.Sequential(nn.Linear(4, 6), norm).double(), x)


@pytest.mark.parametrize("kind", [ScaledFirst, Gated, Dropping])
def test_others_are_not_taken_for_one(kind: Any) -> None:
    with pytest.warns(UserWarning, match="torch.func"):
        PerSampleSquares(model_of(kind()))


def test_one_that_is_another_for_other_inputs_is_noticed() -> None:
    model = model_of(LongOnes()).double()
    statistics = PerSampleSquares(model)
    model(randn(3, 5, 4)).square().mean().backward()
    statistics.mean_square(model[1].weight)
    model.zero_grad()
    statistics.reset()
    model(randn(3, 30, 4)).square().mean().backward()
    with pytest.raises(RuntimeError, match="1.weight"):
        statistics.mean_square(model[1].weight)


@both_backends
def test_under_autocast(backend: str) -> None:
    model, x = to(torch.float32, model_of(Narrow()), randn(3, 5, 4))
    rows = []
    for i in range(3):
        with torch.autocast(x.device.type, torch.bfloat16):
            out = model(x).float()
        (row,) = torch.autograd.grad(squared_error()(out)[i], model[1].weight)
        rows.append(row)
    statistics = PerSampleSquares(model, backend=backend)
    with torch.autocast(x.device.type, torch.bfloat16):
        out = model(x).float()
    squared_error()(out).sum().backward()
    expected = 3 * torch.stack(rows).square().sum(0)
    assert_near(statistics.mean_square(model[1].weight), expected, 0.05, "mean square")
