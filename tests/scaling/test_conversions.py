"""Conversions between learning rates and between decays, against what optimizers do with them."""

from __future__ import annotations

import math

import pytest
import torch

import fusedopt
from fusedopt import scaling


def trajectory(optimizer, p: torch.nn.Parameter, gradients: torch.Tensor) -> torch.Tensor:
    """Return the parameter after each step."""
    places = []
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
        places.append(p.detach().clone())
    return torch.stack(places)


def scalar() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros((), dtype=torch.float64))


@pytest.mark.parametrize("horizon", [1, 2, 10, 100, 1000.5])
def test_momentum_is_a_running_average(horizon) -> None:
    """003-a: v = mu v + lr g is N lr times the running average of g over N steps."""
    # Catches beta = 1/N, beta = N/(N+1) and the inverse of another formula.
    beta = scaling.beta_from_horizon(horizon)
    assert beta == 1 - 1 / horizon
    assert scaling.horizon_from_beta(beta) == pytest.approx(horizon, rel=1e-12)
    gradients = torch.randn(40, dtype=torch.float64)
    velocity = average = 0.0
    for gradient in gradients.tolist():
        velocity = beta * velocity + 0.1 * gradient
        average = (1 - 1 / horizon) * average + gradient / horizon
        assert velocity == pytest.approx(horizon * 0.1 * average, rel=1e-12)


def test_usual_horizons() -> None:
    # Catches steps taken for samples: 0.9, 0.99 and 0.999 are horizons of 10, 100 and 1000 steps.
    for beta, horizon in ((0.9, 10), (0.99, 100), (0.999, 1000)):
        assert scaling.horizon_from_beta(beta) == pytest.approx(horizon)
        assert scaling.beta_from_horizon(horizon) == pytest.approx(beta)


def impulse_response(momentum: float, lr: float, form: str, gradient: float) -> float:
    """Return how far one gradient moves a parameter over all the steps after it."""
    p = scalar()
    options = {"momentum": momentum, "momentum_form": form, "backend": "reference"}
    optimizer = fusedopt.SGD([p], lr=lr, **options)
    steps = 1 if momentum == 0 else math.ceil(math.log(1e-17) / math.log(momentum)) + 1
    gradients = torch.zeros(steps, dtype=torch.float64)
    gradients[0] = gradient
    return -trajectory(optimizer, p, gradients)[-1].item()


@pytest.mark.parametrize("form", ["torch", "velocity", "ema"])
@pytest.mark.parametrize("batch", [1, 32, 500])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
def test_total_effect_of_one_sample(momentum, batch, form) -> None:
    """003-c: one sample's gradient g moves the parameter by eta0 g, whatever mu and B."""
    # Catches a missing factor 1 - mu or B, and the factor 1 - mu in the average's form, where it
    # does not belong.
    eta0, sample = 3e-4, 1.7
    lr = scaling.temperature_lr(eta0, 0.0 if form == "ema" else momentum, batch)
    moved = impulse_response(momentum, lr, form, sample / batch)
    assert moved == pytest.approx(eta0 * sample, rel=1e-12)


def test_temperature_lr_of_the_average() -> None:
    # Catches a docstring that promises for "ema" what the function does not give.
    lr = scaling.temperature_lr(3e-4, 0.9, 64)
    assert scaling.average_lr(lr, 0.9) == pytest.approx(64 * 3e-4)
    assert scaling.temperature_lr(3e-4, 0.0, 64) == pytest.approx(64 * 3e-4)


@pytest.mark.parametrize("nesterov", [False, True])
def test_average_and_sum_take_the_same_steps(nesterov) -> None:
    """002-d: lr / (1 - mu) for the average is lr for the sum, from the first step on."""
    # Catches a multiplication by 1 - mu in place of the division.
    gradients = torch.randn(50, dtype=torch.float64)
    options = {"momentum": 0.8, "nesterov": nesterov, "backend": "reference"}
    p = scalar()
    theirs = trajectory(fusedopt.SGD([p], lr=0.1, **options), p, gradients)
    p = scalar()
    average = fusedopt.SGD([p], lr=scaling.average_lr(0.1, 0.8), momentum_form="ema", **options)
    torch.testing.assert_close(trajectory(average, p, gradients), theirs, rtol=1e-13, atol=1e-15)
    p = scalar()
    torchs = torch.optim.SGD([p], lr=0.1, momentum=0.8, nesterov=nesterov)
    torch.testing.assert_close(trajectory(torchs, p, gradients), theirs, rtol=1e-13, atol=1e-15)


def test_half_life() -> None:
    """Half of a value's weight is gone when so many tokens have been seen."""
    # Catches steps in place of tokens, and a logarithm of the wrong sign or quotient.
    tokens = scaling.half_life(0.99, tokens_per_step=1000)
    assert 0.99 ** (tokens / 1000) == pytest.approx(0.5)
    # Marek et al.: 0.95 at 512 sequences and 0.9999 at one, of 1024 tokens.
    assert scaling.half_life(0.95, 512 * 1024) == pytest.approx(7.08e6, rel=1e-3)
    assert scaling.half_life(0.9999, 1024) == pytest.approx(7.10e6, rel=1e-3)


@pytest.mark.parametrize("beta", [0.1, 0.95, 0.9999])
def test_half_life_there_and_back(beta) -> None:
    # Catches an inverse that is none; and it must agree with the decay that rescale makes.
    tokens = scaling.half_life(beta, 4096)
    assert scaling.beta_from_half_life(tokens, 4096) == pytest.approx(beta, rel=1e-13)
    new = scaling.rescale({"alpha": beta}, 4096, 4 * 4096, "decoupled")["alpha"]
    assert scaling.beta_from_half_life(tokens, 4 * 4096) == pytest.approx(new, rel=1e-13)


@pytest.mark.parametrize("name", ["Adam", "RMSprop"])
def test_epsilon_decoupled_lr(name) -> None:
    """000-g: where eps dominates, the step is eta0 times the gradient, and free of eps."""
    # Catches the quotient that the notes print, whose step changes fourfold as eps is halved.
    moved = []
    for eps in (1e3, 5e2):
        p = scalar()
        lr = scaling.epsilon_decoupled_lr(0.1, eps)
        optimizer = getattr(torch.optim, name)([p], lr=lr, eps=eps)
        moved.append(-trajectory(optimizer, p, torch.full((1,), 0.5, dtype=torch.float64)).item())
    assert moved == pytest.approx([0.1 * 0.5] * 2, rel=2e-3)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("temperature_lr", (-1.0, 0.9, 32), "eta0 must be at least 0"),
        ("temperature_lr", (math.nan, 0.9, 32), "eta0 must be at least 0"),
        ("temperature_lr", (0.1, 1.0, 32), r"momentum must be in \[0, 1\)"),
        ("temperature_lr", (0.1, -0.1, 32), r"momentum must be in \[0, 1\)"),
        ("temperature_lr", (0.1, 0.9, 0), "batch_size must be positive"),
        ("average_lr", (-0.1, 0.9), "lr must be at least 0"),
        ("average_lr", (0.1, 1.0), r"momentum must be in \[0, 1\)"),
        ("average_lr", (0.1, math.nan), r"momentum must be in \[0, 1\)"),
        ("beta_from_horizon", (0.5,), "horizon must be at least 1 step, got 0.5"),
        ("beta_from_horizon", (math.nan,), "horizon must be at least 1 step"),
        ("beta_from_horizon", (1e20,), "horizon = 1e[+]20 is too long"),
        ("horizon_from_beta", (1.0,), r"beta must be in \[0, 1\)"),
        ("horizon_from_beta", (-0.1,), r"beta must be in \[0, 1\)"),
        ("half_life", (0.0, 32), r"beta must be in \(0, 1\)"),
        ("half_life", (1.0, 32), r"beta must be in \(0, 1\)"),
        ("half_life", (0.9, -1), "tokens_per_step must be positive"),
        ("beta_from_half_life", (0, 32), "tokens must be positive"),
        ("beta_from_half_life", (1e3, math.inf), "tokens_per_step must be positive"),
        ("beta_from_half_life", (1e30, 32), "tokens = 1e[+]30 is too long"),
        ("epsilon_decoupled_lr", (0.1, 0.0), "eps must be positive"),
        ("epsilon_decoupled_lr", (-0.1, 1e-8), "eta0 must be at least 0"),
    ],
)
def test_out_of_range(function, arguments, message) -> None:
    # Catches a bound that is not checked, or that nan passes.
    with pytest.raises(ValueError, match=message):
        getattr(scaling, function)(*arguments)
