"""What is allocated for squares: nothing of batch times parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from marks import both_backends
from observed import adam_of, pass_of
from per_sample import Allocations, LanguageModel, mlp, randint, randn, squared_error, to
from torch import Tensor, nn

from fusedopt import PerSampleSquares


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(12, 16, 3), nn.Conv2d(16, 24, 3)
        self.norm, self.head = nn.GroupNorm(4, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.second(self.first(x)))).mean((2, 3)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.language = LanguageModel(64, 24, tied=True)
        self.norm = nn.LayerNorm(64)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.language(ids))


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(24, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


HUNGRY: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "flat": lambda: (nn.Sequential(nn.Linear(40, 48), nn.Tanh(), nn.Linear(48, 8)), randn(16, 40)),
    "time": lambda: (nn.Sequential(nn.Linear(40, 48), nn.Linear(48, 8)), randn(8, 3, 40)),
    "embedding": lambda: (LanguageModel(97, 16), randint(97, 12, 3)),
    "tied": lambda: (Tied(), randint(64, 8, 3)),
    "twice": lambda: (Reused(), randn(8, 3, 32)),
    "twice-flat": lambda: (Reused(), randn(8, 32)),
    "attention": lambda: (Attending(), randn(8, 3, 24)),
    "convolution": lambda: (Convolutional(), randn(6, 12, 6, 5)),
    "norms": lambda: (nn.Sequential(nn.LayerNorm(64), nn.RMSNorm(64)), randn(16, 64)),
}


@both_backends
@pytest.mark.parametrize("name", [n for n in HUNGRY if n != "norms"])
def test_no_allocation_of_batch_times_parameter(name: str, backend: str) -> None:
    """Every operation of two training steps: forward, backward, statistics, update, zero_grad.

    A [batch, *param] of the largest parameter is exactly the bound. The same check on a step with
    torch.func per-sample gradients must trip it, or it would show nothing.
    """
    model, x = to(torch.float32, *HUNGRY[name]())
    largest = max(p.numel() for p in model.parameters())
    bound = len(x) * largest
    statistics = PerSampleSquares(model, backend=backend)
    optimizer = adam_of(model, statistics, backend=backend)
    with Allocations() as seen, torch.autograd.set_multithreading_enabled(False):
        for _ in range(2):
            squared_error()(model(x)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert 0 < seen.largest < bound, f"{seen.what}: {seen.largest} of {bound}"
    assert seen.largest >= largest


def test_the_allocation_check_sees_per_sample_gradients() -> None:
    model, x = to(torch.float32, *HUNGRY["time"]())
    values = {k: p.detach() for k, p in model.named_parameters()}

    def loss(values: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (x[None],)).square().sum()

    with Allocations() as seen:
        torch.func.vmap(torch.func.grad(loss), (None, 0))(values, x)
    assert seen.largest >= len(x) * max(p.numel() for p in model.parameters())


@both_backends
def test_squares_take_four_bytes_an_element(backend: str) -> None:
    """Between steps no more is kept than the squares themselves."""
    model, x = to(torch.float32, mlp(), randn(3, 4))
    statistics = PerSampleSquares(model, backend=backend)
    pass_of(model, x)
    for p in model.parameters():
        q = statistics.mean_square(p)
        assert q.shape == p.shape and q.dtype == torch.float32
        assert q.device == p.device
        assert not q.requires_grad
