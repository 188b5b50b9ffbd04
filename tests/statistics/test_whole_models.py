"""Models that change during a run, and models that are checkpointed, compiled or under autocast."""

from __future__ import annotations

import copy

import pytest
import torch
from marks import both_backends
from observed import Everything, adam_of, graph_breaks, pass_of, untouched
from per_sample import (
    DEVICE,
    DTYPES,
    Expected,
    assert_near,
    backward,
    check_squares,
    mlp,
    randint,
    randn,
    squared_error,
    to,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusedopt import PerSampleSquares

# Changes of the model during a run


def test_unfreezing_and_freezing() -> None:
    """requires_grad may change between steps."""
    model, x = to(torch.float64, mlp(), randn(3, 4))
    model[0].requires_grad_(False)
    statistics = PerSampleSquares(model)
    optimizer = adam_of(model, statistics)
    for frozen in (True, False, True):
        model[0].requires_grad_(not frozen)
        optimizer.zero_grad()
        expected = Expected.of(untouched(model), [(x,)], squared_error())
        pass_of(model, x)
        check_squares(statistics, model, expected)
        optimizer.step()


def test_load_state_dict_and_data_swaps() -> None:
    model, x = to(torch.float64, mlp(), randn(3, 4))
    statistics = PerSampleSquares(model)
    model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()})
    model[0].weight.data = torch.randn_like(model[0].weight)
    expected = Expected.of(untouched(model), [(x,)], squared_error())
    pass_of(model, x)
    check_squares(statistics, model, expected)


def test_move_to_another_type_after_attaching() -> None:
    """model.to(dtype) keeps the parameters and swaps their data."""
    model, x = mlp(torch.float32), randn(3, 4)
    statistics = PerSampleSquares(model, backend="reference")
    model.double()
    expected = Expected.of(untouched(model), [(x,)], squared_error())
    pass_of(model, x)
    check_squares(statistics, model, expected)


@both_backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_model(dtype: torch.dtype, backend: str) -> None:
    """Squares in float32, not in the 16 bits of the gradients, where 1e-4**2 is 0."""
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    model, x = to(dtype, model, randn(4, 3, 6))
    wide = copy.deepcopy(model).double()

    def small(out: Tensor) -> Tensor:
        return (out.double() * 1e-3).sum((1, 2)) / len(out)

    expected = Expected.of(wide, [(x.double(),)], small)
    statistics = PerSampleSquares(model, backend=backend)
    backward(model, [(x,)], small)
    tolerance = 0.06 if dtype == torch.bfloat16 else 0.02
    for name, p in model.named_parameters():
        q = statistics.mean_square(p)
        assert q.dtype == torch.float32
        assert_near(q, expected.mean_square(name), tolerance, name)
        assert q.max() > 0


# Checkpointing, autocast and compilation, around whole models


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner = Everything()
        self.reentrant = reentrant

    def forward(self, ids: Tensor) -> Tensor:
        inner = self.inner
        x = inner.embedding(ids)
        x = checkpoint(self._twice, x, use_reentrant=self.reentrant)
        x = checkpoint(lambda x: inner.attention(x, x, x)[0], x, use_reentrant=self.reentrant)
        return inner.head(inner.norm1(x))

    def _twice(self, x: Tensor) -> Tensor:
        return self.inner.twice(torch.tanh(self.inner.twice(self.inner.norm2(x))))


@both_backends
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_model_over_steps(reentrant: bool, backend: str) -> None:
    """Accumulation over two passes, two steps: nothing of the recomputation is left over."""
    model = to(DTYPES[backend], Checkpointed(reentrant))[0]
    for module in (model.inner.conv, model.inner.group):
        module.requires_grad_(False)
    batches = [(randint(7, 3, 4),), (randint(7, 2, 4, seed=9),)]

    def loss(out: Tensor) -> Tensor:
        return squared_error("sum")(out) / 5

    statistics = PerSampleSquares(model, backend=backend)
    optimizer = adam_of(model, statistics, backend=backend, lr=0.01)
    for _ in range(2):
        plain = untouched(model)
        plain.inner.conv, plain.inner.group = nn.Identity(), nn.Identity()
        expected = Expected.of(_Unchecked(plain), batches, loss)
        rows = {k.removeprefix("plain."): v for k, v in expected.rows.items()}
        backward(model, batches, loss)
        check_squares(statistics, model, Expected(rows))
        optimizer.step()
        optimizer.zero_grad()


class _Unchecked(nn.Module):
    def __init__(self, plain: Checkpointed) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, ids: Tensor) -> Tensor:
        inner = self.plain.inner
        x = inner.twice(torch.tanh(inner.twice(inner.norm2(inner.embedding(ids)))))
        return inner.head(inner.norm1(inner.attention(x, x, x)[0]))


@pytest.mark.parametrize("reentrant", [True, False])
def test_whole_model_checkpointed_from_outside(reentrant: bool) -> None:
    """checkpoint(model, x): the model itself is called twice, once in backward."""
    model, x = to(torch.float64, mlp(), randn(3, 4))
    expected = Expected.of(untouched(model), [(x,)], squared_error())
    statistics = PerSampleSquares(model)
    leaf = x.clone().requires_grad_()  # reentrant checkpointing needs one
    squared_error()(checkpoint(model, leaf, use_reentrant=reentrant)).sum().backward()
    check_squares(statistics, model, expected)


@both_backends
def test_autocast_over_every_layer(backend: str) -> None:
    """Against rows under the same autocast: norms in float32, products in bfloat16."""
    model = to(torch.float32, Everything())[0]
    ids = randint(7, 3, 4)

    def loss(out: Tensor) -> Tensor:
        return squared_error()(out.float())

    with torch.autocast(DEVICE.type, torch.bfloat16):
        expected = Expected.of(untouched(model), [(ids,)], loss)
    statistics = PerSampleSquares(model, backend=backend)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = model(ids)
    loss(out).sum().backward()
    check_squares(statistics, model, expected, tolerance=0.06)


def test_autocast_equals_plain_autocast() -> None:
    """The gradients are those of the same model under the same autocast, to bfloat16's rounding."""
    model = to(torch.float32, Everything())[0]
    plain, ids = copy.deepcopy(model), randint(7, 3, 4)
    PerSampleSquares(model)
    for m in (plain, model):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            out = m(ids)
        squared_error()(out.float()).sum().backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert p.grad.dtype == q.grad.dtype == torch.float32
        assert_near(p.grad, q.grad, 0.05, name)


@pytest.mark.slow
@graph_breaks
def test_compiled_model_with_everything() -> None:
    """Graph breaks or not: values as eager, over accumulation and evaluation."""
    torch._dynamo.reset()
    (model,) = to(torch.float64, Everything())
    batches = [(randint(7, 3, 4),), (randint(7, 2, 4, seed=9),)]

    def loss(out: Tensor) -> Tensor:
        return squared_error("sum")(out) / 5

    expected = Expected.of(untouched(model), batches, loss)
    statistics = PerSampleSquares(model)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        model.zero_grad()
        statistics.reset()
        with torch.no_grad():
            compiled(batches[0][0])
        backward(compiled, batches, loss)
        check_squares(statistics, model, expected)
    torch._dynamo.reset()


@pytest.mark.slow
@graph_breaks
def test_module_compiled_in_place() -> None:
    """model.compile(), and a compiled submodule."""
    torch._dynamo.reset()
    model, x = to(torch.float64, mlp(), randn(3, 4))
    expected = Expected.of(untouched(model), [(x,)], squared_error())
    statistics = PerSampleSquares(model)
    model.compile(backend="aot_eager")
    pass_of(model, x)
    check_squares(statistics, model, expected)
    torch._dynamo.reset()


@pytest.mark.slow
@graph_breaks
def test_compiled_before_attaching() -> None:
    """A graph that was compiled without statistics is not used with them, nor the other way."""
    torch._dynamo.reset()
    model, x = to(torch.float64, mlp(), randn(3, 4))
    compiled = torch.compile(model, backend="aot_eager")
    pass_of(compiled, x)
    model.zero_grad()
    expected = Expected.of(untouched(model), [(x,)], squared_error())
    statistics = PerSampleSquares(model)
    backward(compiled, [(x,)], squared_error())
    check_squares(statistics, model, expected)
    statistics.remove()
    model.zero_grad()
    pass_of(compiled, x)
    for name, p in model.named_parameters():
        assert_near(p.grad, expected.rows[name].sum(0), 1e-11, name)
    torch._dynamo.reset()


@pytest.mark.slow
@graph_breaks
def test_attached_to_the_compiled_wrapper() -> None:
    torch._dynamo.reset()
    model, x = to(torch.float64, mlp(), randn(3, 4))
    expected = Expected.of(untouched(model), [(x,)], squared_error())
    compiled = torch.compile(model, backend="aot_eager")
    statistics = PerSampleSquares(compiled)
    backward(compiled, [(x,)], squared_error())
    check_squares(statistics, model, expected)
    torch._dynamo.reset()
