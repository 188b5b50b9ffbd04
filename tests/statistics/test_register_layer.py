"""``register_layer``: layers of users' own through the kernels, and what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from marks import both_backends
from per_sample import DTYPES, gather, randint, randn, squared_error, to
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusedopt import PerSampleSquares
from fusedopt.statistics import register_layer
from fusedopt.statistics.per_sample import known


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing that is registered here stays, and nothing goes through torch.func."""
    monkeypatch.setattr(known, "_BY_FORWARD", dict(known._BY_FORWARD))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class Transposed(nn.Module):
    """A linear layer with its weight as GPT-2 keeps it, square so that no shape tells."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return (x.reshape(-1, 4) @ self.weight + self.bias).view(x.shape)


class Block(nn.Module):
    """A table, a gain that counts from one, a shift, and two products with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 4))
        self.scale = nn.Parameter(torch.randn(4))
        self.offset = nn.Parameter(torch.randn(4))
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table[ids]
        x = x / x.norm(dim=-1, keepdim=True) * (1 + self.scale) + self.offset
        return torch.tanh(x @ self.weight) @ self.weight.t()


def _transposed(call: Any, module: Any, x: Tensor) -> Tensor:
    return call.linear(x, module.weight, module.bias, transposed=True)


def _block(call: Any, module: Any, ids: Tensor) -> Tensor:
    x = call.embedding(ids, module.table)
    x = call.gain(x / x.norm(dim=-1, keepdim=True), module.scale, offset=1.0)
    x = torch.tanh(call.linear(call.shift(x, module.offset), module.weight, transposed=True))
    return call.linear(x, module.weight)


@both_backends
def test_transposed_weight(backend: str) -> None:
    register_layer(Transposed, _transposed)
    model, x = to(
        DTYPES[backend], nn.Sequential(Transposed(), nn.Tanh(), Transposed()), randn(3, 5, 4)
    )
    gather(model, x, backend=backend)


@both_backends
def test_every_operation(backend: str) -> None:
    """Each parameter of a layer that uses one of them twice."""
    register_layer(Block)(_block)
    (model,) = to(DTYPES[backend], nn.Sequential(Block()))
    gather(model, randint(7, 3, 5), backend=backend)


@pytest.mark.parametrize("frozen", ["table", "scale", "offset", "weight"])
def test_a_frozen_parameter(frozen: str) -> None:
    register_layer(Block, _block)
    (model,) = to(torch.float64, nn.Sequential(Block()))
    getattr(model[0], frozen).requires_grad_(False)
    gather(model, randint(7, 3, 5))


@pytest.mark.parametrize("reentrant", [True, False])
def test_within_a_checkpoint(reentrant: bool) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner = nn.Linear(4, 4), Transposed()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, self.first(x), use_reentrant=reentrant)

    register_layer(Transposed, _transposed)
    model, x = to(torch.float64, Outer(), randn(3, 5, 4))
    plain = squared_error()(model(x))
    plain.sum().backward()
    rows = []
    for i in range(3):
        model.zero_grad()
        squared_error()(model(x))[i].backward()
        rows.append(model.inner.weight.grad.clone())
    model.zero_grad()
    statistics = PerSampleSquares(model)
    squared_error()(model(x)).sum().backward()
    expected = 3 * torch.stack(rows).square().sum(0)
    torch.testing.assert_close(statistics.mean_square(model.inner.weight), expected)


def test_a_subclass_without_a_forward_of_its_own() -> None:
    class Named(Transposed):
        pass

    register_layer(Transposed, _transposed)
    model, x = to(torch.float64, nn.Sequential(Named()), randn(3, 5, 4))
    gather(model, x)


def test_a_subclass_with_a_forward_of_its_own_is_another_layer() -> None:
    class Doubled(Transposed):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    register_layer(Transposed, _transposed)
    with pytest.warns(UserWarning, match="torch.func"):
        PerSampleSquares(nn.Sequential(Doubled()))


def test_the_layer_of_the_wrong_function_is_named() -> None:
    """The square weight the other way round: no shape tells."""
    register_layer(Transposed, lambda call, module, x: call.linear(x, module.weight, module.bias))
    model, x = to(torch.float64, nn.Sequential(nn.Tanh(), Transposed()), randn(3, 5, 4))
    PerSampleSquares(model)
    with pytest.raises(RuntimeError, match=r"1 \(Transposed\).*something else than"):
        model(x)


def test_a_method_that_a_subclass_overrides_is_noticed() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def prepared(self, x: Tensor) -> Tensor:
            return x

        def forward(self, x: Tensor) -> Tensor:
            return self.prepared(x) @ self.weight

    class Other(Scaled):
        def prepared(self, x: Tensor) -> Tensor:
            return x * 2

    @register_layer(Scaled)
    def scaled(call: Any, module: Any, x: Tensor) -> Tensor:
        return call.linear(x, module.weight, transposed=True)

    model, x = to(torch.float64, nn.Sequential(Other()), randn(3, 5, 4))
    PerSampleSquares(model)
    with pytest.raises(RuntimeError, match=r"0 \(Other\).*something else than"):
        model(x)


def test_evaluation_is_compared_too() -> None:
    """A function that is right in training alone."""

    class Moody(Transposed):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y if self.training else -y

    register_layer(Moody, _transposed)
    model, x = to(torch.float64, nn.Sequential(Moody()), randn(3, 5, 4))
    PerSampleSquares(model)
    model(x)
    model.eval()
    with pytest.raises(RuntimeError, match="something else than"):
        model(x)


def test_random_numbers_and_buffers_are_as_without_a_comparison() -> None:
    class Dropping(Transposed):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return nn.functional.dropout(super().forward(x), 0.5, self.training)

    @register_layer(Dropping)
    def dropping(call: Any, module: Any, x: Tensor) -> Tensor:
        module.calls += 1
        return nn.functional.dropout(_transposed(call, module, x), 0.5, module.training)

    model, x = to(torch.float64, nn.Sequential(Dropping()), randn(3, 5, 4))
    gather(model, x)
    assert model[0].calls == 1


def test_a_parameter_that_the_function_reads_by_itself_is_an_error() -> None:
    @register_layer(Transposed)
    def function(call: Any, module: Any, x: Tensor) -> Tensor:
        return call.linear(x, module.weight, transposed=True) + module.bias

    model, x = to(torch.float64, nn.Sequential(Transposed()), randn(3, 5, 4))
    statistics = PerSampleSquares(model)
    model(x).square().mean().backward()
    statistics.mean_square(model[0].weight)
    with pytest.raises(RuntimeError, match="0.bias"):
        statistics.mean_square(model[0].bias)


class Inherited(nn.Linear):
    pass


class InheritedTwice(Transposed):
    pass


@pytest.mark.parametrize(
    ("layer_class", "function", "error", "match"),
    [
        (nn.Linear, _transposed, ValueError, "Linear.*known already"),
        (Inherited, _transposed, ValueError, "Inherited.*known already"),
        (nn.MultiheadAttention, _transposed, ValueError, "known already"),
        (nn.ModuleList, _transposed, ValueError, "never called"),
        (InheritedTwice, _transposed, ValueError, "register that class"),
        (Transposed(), _transposed, TypeError, "layer_class"),
        (Transposed, "linear", TypeError, "callable"),
    ],
)  # fmt: skip
def test_refused(layer_class: Any, function: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        register_layer(layer_class, function)
