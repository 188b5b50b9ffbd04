"""Parameters that are used more than once: uses are summed before they are squared."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from layer_parts import evaluated_norm, even_kernels, random_norm
from marks import both_backends, each_reduction
from per_sample import (
    DTYPES,
    Expected,
    LanguageModel,
    backward,
    check_squares,
    gather,
    randint,
    randn,
    squared_error,
    to,
    token_mean,
)
from torch import Tensor, nn

from fusedopt import PerSampleSquares

pytestmark = even_kernels


class Twice(nn.Module):
    """One module called twice, at two different lengths."""

    def __init__(self, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layer = layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x))[:, 1:])


TWICE: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 4),
    "layer-norm": lambda: random_norm(nn.LayerNorm(4)),
    "rms-norm": lambda: random_norm(nn.RMSNorm(4)),
}


@both_backends
@pytest.mark.parametrize("name", TWICE)
def test_module_used_twice(name: str, backend: str) -> None:
    """The uses are summed before they are squared: S1 + S2 lacks the cross term."""
    gather(*to(DTYPES[backend], Twice(TWICE[name]), randn(3, 4, 4)), backend=backend)


@both_backends
def test_flat_module_used_twice(backend: str) -> None:
    """Without a time dimension the uses become one: (E**2)'(A**2) over both is not exact."""
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), shared)
    gather(*to(DTYPES[backend], model, randn(3, 4)), backend=backend)


@both_backends
def test_convolution_used_twice(backend: str) -> None:
    """On images of two sizes."""
    shared = nn.Conv2d(2, 2, 3)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    gather(*to(DTYPES[backend], model, randn(3, 2, 6, 5)), backend=backend)


@both_backends
def test_group_and_batch_norm_used_twice(backend: str) -> None:
    group, batch = random_norm(nn.GroupNorm(2, 4)), evaluated_norm(nn.BatchNorm1d(4))
    model = nn.Sequential(group, nn.Tanh(), batch, nn.Tanh(), group, nn.Tanh(), batch)
    gather(*to(DTYPES[backend], model, randn(3, 4, 3)), backend=backend)


@both_backends
def test_attention_used_twice(backend: str) -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            y = self.inner(x, x, x)[0]
            return self.inner(y, memory, memory)[0]

    gather(*to(DTYPES[backend], Again(), randn(3, 4, 4), randn(3, 2, 4)), backend=backend)


@both_backends
def test_embedding_used_twice(backend: str) -> None:
    """Of source and target: the same token in both is one row."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(3, 2)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return torch.cat((self.embedding(a), self.embedding(b) * 2), 1)

    gather(
        *to(DTYPES[backend], Both(), randint(3, 3, 4), randint(3, 3, 2, seed=5)), backend=backend
    )


@both_backends
@pytest.mark.parametrize("time", [None, 3], ids=["flat", "time"])
def test_weight_of_two_modules(backend: str, time: int | None) -> None:
    """Shared weight, biases apart."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    x = randn(3, 4) if time is None else randn(3, time, 4)
    gather(*to(DTYPES[backend], model, x), backend=backend)


def test_weight_of_modules_of_different_kinds() -> None:
    """Linear and a 1x1 convolution cannot share a shape, a norm's gain and a bias can."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    model[1].weight = model[0].bias
    gather(*to(torch.float64, model, randn(3, 2, 4)), backend="reference")


@each_reduction
@both_backends
@pytest.mark.parametrize("padding_idx", [None, 2])
def test_tied_embedding_and_head(backend: str, padding_idx: int | None, reduction: str) -> None:
    """S_embedding + S_head + 2 (cross term), with tokens that repeat within a sample."""
    (model,) = to(DTYPES[backend], LanguageModel(tied=True, padding_idx=padding_idx))
    ids = randint(4, 3, 6)  # of 7: some rows belong to the head alone
    targets = randint(7, 3, 6, seed=8)

    def loss(logits: Tensor) -> Tensor:
        shares = token_mean(targets)(logits)
        return shares if reduction == "mean" else shares * targets.numel()

    gather(model, ids, backend=backend, loss=loss, reduction=reduction)


def test_tied_three_ways() -> None:
    """Encoder's and decoder's embedding and the head, as in the original transformer."""

    class Translator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.source, self.target = nn.Embedding(5, 4), nn.Embedding(5, 4)
            self.head = nn.Linear(4, 5, bias=False)
            self.source.weight = self.target.weight = self.head.weight

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.head(torch.tanh(self.source(a).mean(1, keepdim=True) + self.target(b)))

    model, a, b = to(torch.float64, Translator(), randint(5, 3, 4), randint(5, 3, 3, seed=5))
    gather(model, a, b, backend="reference")


def test_module_registered_twice() -> None:
    """Under two names, in two containers, used in each."""
    shared = nn.Linear(4, 4)

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Sequential(shared, nn.Tanh())
            self.b = nn.ModuleDict({"c": shared})

        def forward(self, x: Tensor) -> Tensor:
            return self.b["c"](self.a(x))

    gather(*to(torch.float64, Holder(), randn(3, 2, 4)), backend="reference")


def test_use_that_is_thrown_away() -> None:
    """A second call whose output reaches no loss adds nothing, and is no error."""

    class Wasteful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.layer(x * 2)
            return self.layer(x)

    gather(*to(torch.float64, Wasteful(), randn(3, 2, 4)), backend="reference")


def test_layer_that_reaches_no_loss() -> None:
    """A head without gradient: the others are exact, and it has no squares to speak of."""

    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = torch.tanh(self.body(x))
            return self.a(y), self.b(y)

    model, x = to(torch.float64, TwoHeads(), randn(3, 4))
    plain = copy.deepcopy(model)
    statistics = PerSampleSquares(model)
    backward(model, [(x,)], squared_error())
    assert model.b.weight.grad is None
    del plain.b  # autograd gives its parameters no rows at all
    plain.b = nn.Identity()
    check_squares(statistics, model, Expected.of(plain, [(x,)], squared_error()))
