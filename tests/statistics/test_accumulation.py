"""Passes whose squares add up, and what makes ``PerSampleSquares`` begin anew."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from marks import both_backends
from observed import Everything, adam_of, clones, pass_of, untouched
from per_sample import (
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

from fusedopt import PerSampleSquares

ZERO: dict[str, Callable[[nn.Module, Any], None]] = {
    "optimizer": lambda model, optimizer: optimizer.zero_grad(),
    "optimizer-keep": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model": lambda model, optimizer: model.zero_grad(),
    "by-hand": lambda model, optimizer: [setattr(p, "grad", None) for p in model.parameters()],
}


@both_backends
@pytest.mark.parametrize("how", ZERO)
def test_zero_grad_forgets(how: str, backend: str) -> None:
    """The next step's squares are the next batch's alone, however gradients were cleared."""
    model = to(DTYPES[backend], Everything())[0]
    statistics = PerSampleSquares(model, backend=backend)
    optimizer = adam_of(model, statistics, backend=backend)
    for seed in range(3):
        ids = randint(7, 3 - seed // 2, 4, seed=seed)
        expected = Expected.of(untouched(model), [(ids,)], squared_error())
        pass_of(model, ids)
        check_squares(statistics, model, expected)
        optimizer.step()
        ZERO[how](model, optimizer)


def test_zero_grad_with_forward_pending() -> None:
    """zero_grad() between forward and backward, as many loops have it."""
    model, x = to(torch.float64, mlp(), randn(3, 4))
    statistics = PerSampleSquares(model)
    optimizer = adam_of(model, statistics)
    for _ in range(3):
        expected = Expected.of(untouched(model), [(x,)], squared_error())
        loss = squared_error()(model(x)).sum()
        optimizer.zero_grad()
        loss.backward()
        check_squares(statistics, model, expected)
        optimizer.step()


def test_zeroed_gradients_without_the_optimizer() -> None:
    """model.zero_grad(set_to_none=False): gradients are zeros, squares are not: refuse or reset.

    Silently adding the last step's squares to the next one's would be the mistake.
    """
    model, x = to(torch.float64, mlp(), randn(3, 4))
    statistics = PerSampleSquares(model)
    optimizer = adam_of(model, statistics)
    pass_of(model, x)
    optimizer.step()
    model.zero_grad(set_to_none=False)
    expected = Expected.of(untouched(model), [(x,)], squared_error())
    try:
        pass_of(model, x)
        optimizer_error = None
        squares = {n: statistics.mean_square(p).clone() for n, p in model.named_parameters()}
        optimizer.step()
    except RuntimeError as error:
        optimizer_error = str(error)
        assert "zero_grad" in optimizer_error
        return
    for name, q in squares.items():
        assert_near(q, expected.mean_square(name), 1e-11, name)


def test_step_twice_on_one_gradient() -> None:
    """As torch allows; the second step has the same squares."""
    model, x = to(torch.float64, mlp(), randn(3, 4))
    statistics = PerSampleSquares(model)
    optimizer = adam_of(model, statistics)
    pass_of(model, x)
    squares = clones(statistics.mean_square(p) for p in model.parameters())
    optimizer.step()
    optimizer.step()
    for p, q in zip(model.parameters(), squares, strict=True):
        assert torch.equal(statistics.mean_square(p), q)


def test_reset_by_hand() -> None:
    model, x = to(torch.float64, mlp(), randn(3, 4))
    statistics = PerSampleSquares(model)
    pass_of(model, x)
    assert statistics.samples == 3
    statistics.reset()
    assert statistics.samples == 0
    model.zero_grad()
    expected = Expected.of(untouched(model), [(x,)], squared_error())
    pass_of(model, x)
    check_squares(statistics, model, expected)


@both_backends
def test_evaluation_in_between(backend: str) -> None:
    """no_grad and inference_mode forwards between forward, backward and step count nothing."""
    model = to(DTYPES[backend], Everything())[0]
    ids, other = randint(7, 3, 4), randint(7, 5, 2, seed=4)
    expected = Expected.of(untouched(model), [(ids,)], squared_error())
    statistics = PerSampleSquares(model, backend=backend)

    def evaluate() -> None:
        model.eval()
        with torch.no_grad():
            model(other)
        with torch.inference_mode():
            model(other)
        model.train()

    evaluate()
    out = model(ids)
    evaluate()
    squared_error()(out).sum().backward()
    evaluate()
    check_squares(statistics, model, expected)
    adam_of(model, statistics, backend=backend).step()


def test_evaluation_with_gradients_but_no_backward() -> None:
    """A forward whose graph is dropped is no sample."""
    model, x = to(torch.float64, mlp(), randn(3, 4))
    expected = Expected.of(untouched(model), [(x,)], squared_error())
    statistics = PerSampleSquares(model)
    model(randn(5, 4))
    pass_of(model, x)
    check_squares(statistics, model, expected)


def test_two_forwards_before_their_backwards() -> None:
    """As in contrastive or adversarial training: each graph remembers its own batch."""
    model, x = to(torch.float64, mlp(), randn(5, 4))

    def loss(out: Tensor) -> Tensor:
        return squared_error("sum")(out) / 5

    expected = Expected.of(untouched(model), [(x[:3],), (x[3:],)], loss)
    for order in ((0, 1), (1, 0)):
        twin = copy.deepcopy(model)
        statistics = PerSampleSquares(twin)
        losses = [loss(twin(x[:3])).sum(), loss(twin(x[3:])).sum()]
        for place in order:
            losses[place].backward()
        check_squares(statistics, twin, expected)


def test_one_backward_through_two_forwards() -> None:
    """The sum of two losses: five samples, not three or two."""
    model, x = to(torch.float64, mlp(), randn(5, 4))

    def loss(out: Tensor) -> Tensor:
        return squared_error("sum")(out) / 5

    expected = Expected.of(untouched(model), [(x[:3],), (x[3:],)], loss)
    statistics = PerSampleSquares(model)
    (loss(model(x[:3])).sum() + loss(model(x[3:])).sum()).backward()
    check_squares(statistics, model, expected)


def test_autograd_grad_adds_nothing_unseen() -> None:
    """torch.autograd.grad wants the input's gradient: p.grad stays, and so should the squares."""
    model, x = to(torch.float64, mlp(), randn(3, 4))
    expected = Expected.of(untouched(model), [(x,)], squared_error())
    statistics = PerSampleSquares(model)
    leaf = x.clone().requires_grad_()
    try:
        (sensitivity,) = torch.autograd.grad(model(leaf).sum(), leaf)
    except RuntimeError as error:
        assert str(error)
        return
    assert sensitivity.shape == x.shape
    model.zero_grad()
    statistics.reset()
    pass_of(model, x)
    check_squares(statistics, model, expected)


def test_input_gradient_alone_does_not_count() -> None:
    """Without a reset in between: what reached no p.grad is in no square, or is refused."""
    model, x = to(torch.float64, mlp(), randn(3, 4))
    expected = Expected.of(untouched(model), [(x,)], squared_error())
    statistics = PerSampleSquares(model)
    optimizer = adam_of(model, statistics)
    leaf = x.clone().requires_grad_()
    try:
        torch.autograd.grad(model(leaf).sum(), leaf)
        pass_of(model, x)
        optimizer.step()
    except RuntimeError as error:
        assert len(str(error)) > 20
        return
    for name, p in model.named_parameters():
        assert_near(statistics.mean_square(p), expected.mean_square(name), 1e-11, name)


def test_two_backward_passes_through_one_forward() -> None:
    model, x = to(torch.float64, mlp(), randn(3, 4))
    statistics = PerSampleSquares(model)
    optimizer = adam_of(model, statistics)
    out = model(x)
    out[:, 0].square().mean().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward"):
        out[:, 1].square().mean().backward()
        optimizer.step()


@both_backends
def test_gradient_accumulates_onto_what_is_there(backend: str) -> None:
    """p.grad keeps its tensor over passes, as torch's does."""
    (model,) = to(DTYPES[backend], mlp())
    x = randn(3, 4, dtype=DTYPES[backend])
    PerSampleSquares(model, backend=backend)
    pass_of(model, x)
    before = [p.grad for p in model.parameters()]
    values = clones(before)
    pass_of(model, x)
    for p, g, v in zip(model.parameters(), before, values, strict=True):
        assert p.grad is g
        assert_near(p.grad, 2 * v, 1e-6, "accumulated")


def test_retained_graph() -> None:
    """retain_graph=True alone is no second pass."""
    model, x = to(torch.float64, mlp(), randn(3, 4))
    expected = Expected.of(untouched(model), [(x,)], squared_error())
    statistics = PerSampleSquares(model)
    optimizer = adam_of(model, statistics)
    loss = squared_error()(model(x)).sum()
    loss.backward(retain_graph=True)
    check_squares(statistics, model, expected)
    optimizer.step()
    optimizer.zero_grad()
    expected = Expected.of(untouched(model), [(x,)], squared_error())
    backward(model, [(x,)], squared_error())
    check_squares(statistics, model, expected)


def test_backward_to_some_parameters() -> None:
    """backward(inputs=...): the others have neither gradient nor squares."""
    model, x = to(torch.float64, mlp(), randn(3, 4))
    expected = Expected.of(untouched(model), [(x,)], squared_error())
    statistics = PerSampleSquares(model)
    weight = model[2].weight
    try:
        squared_error()(model(x)).sum().backward(inputs=[weight])
        square = statistics.mean_square(weight).clone()
        adam_of(model, statistics).step()
    except RuntimeError as error:
        assert len(str(error)) > 20
        return
    assert model[0].weight.grad is None
    assert_near(weight.grad, expected.rows["2.weight"].sum(0), 1e-11, "gradient")
    assert_near(square, expected.mean_square("2.weight"), 1e-11, "square")
