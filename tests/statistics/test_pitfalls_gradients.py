"""Pitfalls of per-sample squares, m and q: what else is in a gradient.

The letters are the design note's. A pitfall is a mistake that somebody has made: most of
them give numbers that look right.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from marks import both_backends
from observed import adam_without_decay
from per_sample import (
    DEVICE,
    DTYPES,
    Expected,
    assert_near,
    backward,
    check_squares,
    gather,
    mlp,
    randn,
    squared_error,
    to,
)
from torch import Tensor, nn

from fusedopt import BatchDecoupledRMSprop, GradSampleSquares, PerSampleSquares

# m


def _right_or_refused(make: Callable[[], nn.Module], x: Tensor) -> None:
    """Squares of every parameter, exact, or a RuntimeError by the end of step()."""
    torch.manual_seed(1)
    plain = make()
    torch.manual_seed(1)
    model = make()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            statistics = PerSampleSquares(model)
            backward(model, [(x,)], squared_error())
        optimizer = adam_without_decay(model.parameters(), statistics)
        expected = Expected.of(plain, [(x,)], squared_error())
        named = dict(model.named_parameters())
        squares = {name: statistics.mean_square(named[name]) for name in expected.rows}
        optimizer.step()
    except RuntimeError as error:
        assert _names_a_module_or_parameter(str(error), plain), str(error)
        return
    for name, q in squares.items():
        assert_near(q, expected.mean_square(name), 1e-10, name)


def _names_a_module_or_parameter(message: str, model: nn.Module) -> bool:
    names = [n for n, _ in model.named_modules() if n] + [n for n, _ in model.named_parameters()]
    return any(re.search(rf"\b{re.escape(name)}\b", message) for name in names)


@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm", "orthogonal", "old_weight_norm"])
def test_pitfall_m_reparametrised_weights(how: str) -> None:
    """The squares of W are not those of what W is computed from."""

    def make() -> nn.Module:
        layer = nn.Linear(4, 4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            {
                "weight_norm": nn.utils.parametrizations.weight_norm,
                "spectral_norm": nn.utils.parametrizations.spectral_norm,
                "orthogonal": nn.utils.parametrizations.orthogonal,
                "old_weight_norm": nn.utils.weight_norm,
            }[how](layer)
        return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), layer).double().to(DEVICE).eval()

    _right_or_refused(make, randn(3, 4))


class Functional(nn.Module):
    """The weight of a layer, used past the layer too (or only)."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight
        if self.how == "transposed":
            return torch.tanh(self.layer(x)) @ weight
        if self.how == "alone":
            return nn.functional.linear(x, weight.t())
        if self.how == "penalty":
            return self.layer(x) + weight.square().sum()
        return self.layer(x)


@pytest.mark.parametrize("how", ["transposed", "alone"])
def test_pitfall_m_weight_used_past_its_module(how: str) -> None:
    """Found at step(), by the parameter's name; nothing is stepped."""
    (model,) = to(torch.float64, nn.Sequential(nn.Linear(4, 4), Functional(how)))
    statistics = PerSampleSquares(model)
    optimizer = adam_without_decay(model.parameters(), statistics)
    squared_error()(model(randn(3, 4))).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"1\.layer\.weight"):
        optimizer.step()
    for a, p in zip(before, model.parameters(), strict=True):
        assert torch.equal(a, p)
    assert not optimizer.state


def test_pitfall_m_penalty_in_the_loss() -> None:
    """A weight penalty is no sample's: what it adds to p.grad has no squares."""
    (model,) = to(torch.float64, mlp())
    statistics = PerSampleSquares(model)
    optimizer = adam_without_decay(model.parameters(), statistics)
    loss = squared_error()(model(randn(3, 4))).sum() + 0.1 * model[0].weight.square().sum()
    loss.backward()
    with pytest.raises(RuntimeError, match=r"0\.weight"):
        optimizer.step()


CHANGES: dict[str, Callable[[list[Tensor]], Any]] = {
    "clip_grad_value_": lambda params: nn.utils.clip_grad_value_(params, 0.01),
    "mul_": lambda params: params[0].grad.mul_(0.5),
    "another": lambda params: setattr(params[0], "grad", params[0].grad * 0.5),
}


@pytest.mark.parametrize("how", CHANGES)
def test_pitfall_m_gradients_changed_by_hand(how: str) -> None:
    """Squares cannot follow what was done to p.grad: refused by name, with the way out."""
    (model,) = to(torch.float64, mlp())
    statistics = PerSampleSquares(model)
    optimizer = adam_without_decay(model.parameters(), statistics)
    squared_error()(model(randn(3, 4))).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    CHANGES[how](list(model.parameters()))
    with pytest.raises(RuntimeError, match=r"0\.weight.*GlobalNorm.*rescale"):
        optimizer.step()
    for p, b in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.detach(), b)
    assert not optimizer.state
    optimizer.zero_grad()
    squared_error()(model(randn(3, 4))).sum().backward()
    optimizer.step()  # the next one is whole again


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_pitfall_m_rescaled_gradients(factor: float) -> None:
    """rescale(factor) says what every gradient was multiplied by: the squares follow by its square.

    Half the loss from the start is the same.
    """
    (model,) = to(torch.float64, mlp())
    x = randn(3, 4)
    plain = copy.deepcopy(model)
    expected = Expected.of(plain, [(x,)], lambda out: squared_error()(out) * factor)
    statistics = PerSampleSquares(model)
    optimizer = adam_without_decay(model.parameters(), statistics)
    squared_error()(model(x)).sum().backward()
    for p in model.parameters():
        p.grad.mul_(factor)
    statistics.rescale(factor)
    check_squares(statistics, model, expected)
    optimizer.step()
    for name, p in model.named_parameters():
        assert_near(optimizer.state[p]["exp_avg_sq"], 0.2 * expected.mean_square(name), 1e-11, name)


@pytest.mark.parametrize("when", ["before", "after"])
def test_pitfall_m_hook_on_a_parameter(when: str) -> None:
    """p.register_hook changes the gradient on its way to p.grad: refused, or right."""
    (model,) = to(torch.float64, mlp())
    x = randn(3, 4)
    expected = Expected.of(copy.deepcopy(model), [(x,)], squared_error())
    if when == "before":
        model[0].weight.register_hook(lambda g: g * 2)
    statistics = PerSampleSquares(model)
    optimizer = adam_without_decay(model.parameters(), statistics)
    if when == "after":
        model[0].weight.register_hook(lambda g: g * 2)
    try:
        squared_error()(model(x)).sum().backward()
        squares = statistics.mean_square(model[0].weight).clone()
        optimizer.step()
    except RuntimeError as error:
        assert "0.weight" in str(error)
        return
    q = expected.mean_square("0.weight") * 4
    assert_near(squares, q, 1e-11, "squares of the doubled gradient")


# q


@both_backends
def test_pitfall_q_dropout(backend: str) -> None:
    """Masks belong to samples: one forward, no other mask in the squares than in the gradient."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    gather(*to(DTYPES[backend], model, randn(3, 2, 4)), backend=backend)


@both_backends
def test_pitfall_q_coupled_decay_stays_out_of_the_squares(backend: str) -> None:
    """RMSprop's decay is added to the mean gradient, in the direction and in its square."""
    samples = randn(4, 7, dtype=DTYPES[backend])
    start = randn(7, dtype=DTYPES[backend], seed=1)
    for b, w in ((1, 1.0), (2, 1 / 3), (4, 0.0)):
        p = nn.Parameter(start.clone())
        p.grad_sample = samples
        optimizer = BatchDecoupledRMSprop(
            [p],
            lr=0.1,
            alpha=0.6,
            weight_decay=0.5,
            statistics=GradSampleSquares(),
            virtual_batch_size=b,
            backend=backend,
        )
        optimizer.step()
        g = samples.mean(0) + 0.5 * start
        a2 = (1 - w) * g.square() + w * samples.square().mean(0)
        tolerance = 1e-12 if backend == "reference" else 1e-5
        assert_near(optimizer.state[p]["square_avg"], 0.4 * a2, tolerance, f"b = {b}")
        expected = start - 0.1 * g / ((0.4 * a2).sqrt() + 1e-8)
        assert_near(p, expected, tolerance, f"p at b = {b}")


def test_pitfall_q_decoupled_decay_stays_out_of_the_squares() -> None:
    samples = randn(4, 7)
    states = []
    for decay in (0.0, 0.5):
        p = nn.Parameter(randn(7, seed=1))
        p.grad_sample = samples
        optimizer = adam_without_decay([p], GradSampleSquares(), weight_decay=decay)
        optimizer.step()
        states.append((optimizer.state[p]["exp_avg_sq"], p.detach()))
    assert torch.equal(states[0][0], states[1][0])
    assert not torch.equal(states[0][1], states[1][1])
