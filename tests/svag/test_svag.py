"""SVAG: its coefficients, and the hyper-parameters and states that it rescales."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from contract import DEVICE, assert_same_bits, assert_same_state, groups_of, new_params, snapshot
from marks import both_backends
from svag_by_hand import (
    ELLS,
    EXACT,
    NAMES,
    OPTIONS,
    draw,
    each_ell,
    each_name,
    each_path,
    give,
    mix,
    plain,
    rescaled,
    stepped,
    svag_step,
    weights,
)
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from fusedopt import SVAG

ADAPTIVE = NAMES[1:]


def _options(optimizer: Any, place: int = 0) -> dict[str, Any]:
    return {k: v for k, v in optimizer.param_groups[place].items() if k != "params"}


# The oracle


@each_name
@pytest.mark.parametrize("ell", (*ELLS, 8, 1.0001))
def test_weights(name: str, ell: float) -> None:
    # Catches ell for ell^2, a root of the wrong sign, and the two of them exchanged.
    svag = SVAG(plain(name), ell)
    amplified = ell if name == "SGD" else ell**2
    r1, r2 = svag.weights
    assert r1 + r2 == pytest.approx(1, rel=1e-15)
    assert r1**2 + r2**2 == pytest.approx(amplified, rel=1e-14)
    assert r1 >= 1 and r2 <= 0
    assert svag.weights == pytest.approx(weights(name, ell), rel=1e-15)
    assert svag.steps_per_step == pytest.approx(amplified, rel=1e-15)
    assert svag.ell == ell


# Three gradients in two dimensions with unequal probabilities: a distribution with a mean, a
# correlation and a skewness.
VALUES = torch.tensor([[1.0, -2.0], [0.5, 3.0], [-2.0, 0.25]], dtype=torch.float64)
SHARES = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
PAIRS = list(itertools.product(range(3), repeat=2))


def _moments(values: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    mean = shares @ values
    apart = values - mean
    return mean, (shares[:, None] * apart).T @ apart


@both_backends
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
@pytest.mark.parametrize("ell", [2, 3.5, 8])
def test_moments_of_the_mixed_gradient(name: str, ell: float, backend: str) -> None:
    # Catches a mix in the kernel that is not the mix of the attributes: mean and covariance of the
    # gradient used, over all pairs of two independent draws.
    p = Parameter(torch.zeros(len(PAIRS), 2, dtype=torch.float64, device=DEVICE))
    options: dict[str, Any] = {"lr": float(ell), "weight_decay": 0.0}
    if name != "SGD":
        options["betas"] = (0.5, 0.5)
    svag = SVAG(plain(name, [p], **options, backend=backend), ell)
    svag_step(
        svag,
        [VALUES[[i for i, _ in PAIRS]].to(DEVICE)],
        [VALUES[[j for _, j in PAIRS]].to(DEVICE)],
    )
    if name == "SGD":
        used, amplified = -p.detach(), ell
    else:
        beta = 1 - 0.5 / ell**2
        used, amplified = svag.optimizer.state[p]["exp_avg"] / (1 - beta), ell**2
    mean, covariance = _moments(VALUES, SHARES)
    shares = torch.stack([SHARES[i] * SHARES[j] for i, j in PAIRS])
    of_mean, of_covariance = _moments(used.cpu(), shares)
    torch.testing.assert_close(of_mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(of_covariance, amplified * covariance, rtol=1e-12, atol=1e-12)


@both_backends
def test_second_moment_of_rmsprop(backend: str) -> None:
    # Catches squares that are mixed instead of the square of the mix.
    p = Parameter(torch.zeros(len(PAIRS), 2, dtype=torch.float64, device=DEVICE))
    svag = SVAG(plain("RMSprop", [p], alpha=0.5, weight_decay=0.0, backend=backend), 3)
    first, second = (VALUES[[pair[k] for pair in PAIRS]].to(DEVICE) for k in (0, 1))
    svag_step(svag, [first], [second])
    used = svag.optimizer.state[p]["square_avg"].cpu() / (0.5 / 9)
    shares = torch.stack([SHARES[i] * SHARES[j] for i, j in PAIRS])
    mean, covariance = _moments(VALUES, SHARES)
    torch.testing.assert_close(
        shares @ used, mean**2 + 9 * covariance.diagonal(), rtol=1e-12, atol=1e-12
    )


# Hyper-parameters


@each_name
@each_ell
def test_hyper_parameters(name: str, ell: float) -> None:
    # Catches a missing or a wrong factor, and one on what it is not for: coupled weight decay.
    optimizer = plain(name)
    before = _options(optimizer)
    svag = SVAG(optimizer, ell)
    assert svag.optimizer is optimizer
    after, expected = _options(optimizer), rescaled(name, ell, before)
    assert after.keys() == {*before, "svag_ell"}
    for key, value in expected.items():
        if isinstance(value, (bool, str, type(None))):
            assert after[key] == value, key
        else:
            assert after[key] == pytest.approx(value, rel=1e-14), key


def test_short_averages_keep_their_digits() -> None:
    # Catches 1 - (1 - beta) / ell^2 formed in float32, where 0.999999 has no digits left.
    optimizer = plain("Adam", betas=(0.99, 0.999999))
    SVAG(optimizer, 8)
    assert 1 - optimizer.param_groups[0]["betas"][1] == pytest.approx(1e-6 / 64, rel=1e-8)


@each_ell
def test_every_group_has_its_own(ell: float) -> None:
    # Catches one group's numbers, or its way of decay, for another's.
    groups: list[dict[str, Any]] = [
        {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.1},
        {"lr": 0.4, "betas": (0.7, 0.99), "eps": 1e-5, "weight_decay": 0.2},
        {"lr": 0.8, "betas": (0.0, 0.8), "eps": 1e-5, "weight_decay": 0.3},
    ]
    groups[1]["decoupled_weight_decay"] = True
    optimizer = fusedopt.Adam([{**g, "params": [Parameter(torch.ones(2))]} for g in groups])
    SVAG(optimizer, ell)
    for place, group in enumerate(groups):
        for key, value in rescaled("Adam", ell, group).items():
            assert optimizer.param_groups[place][key] == pytest.approx(value, rel=1e-14)


@each_name
def test_learning_rate_in_a_tensor(name: str) -> None:
    # Catches a tensor that is replaced by a number, and one that two groups share and that is
    # divided twice.
    shared = torch.tensor(0.5)
    groups = [{"params": [p]} for p in new_params(((2,), (3,)))]
    own = {"params": new_params(((4,),)), "lr": torch.tensor(0.25, dtype=torch.float64)}
    optimizer = plain(name, [*groups, own], lr=shared)
    SVAG(optimizer, 2)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert all(isinstance(rate, Tensor) for rate in rates)
    assert [rate.dtype for rate in rates] == [torch.float32, torch.float32, torch.float64]
    assert [rate.item() for rate in rates] == [0.25, 0.25, 0.125]


def test_betas_and_decay_in_tensors() -> None:
    # Catches tensors that two groups share, rescaled once for each.
    betas = torch.tensor([0.5, 0.75], dtype=torch.float64).unbind()
    decay = torch.tensor(0.25)
    groups = [{"params": [p]} for p in new_params(((2,), (3,)))]
    optimizer = fusedopt.AdamW(groups, lr=0.5, betas=betas, capturable=True)
    for group in optimizer.param_groups:
        group["weight_decay"] = decay
    SVAG(optimizer, 2)
    for group in optimizer.param_groups:
        assert [float(beta) for beta in group["betas"]] == [0.875, 0.9375]
        assert float(group["weight_decay"]) == 0.125


@each_name
def test_scheduler_that_came_before(name: str) -> None:
    # Catches an initial_lr of the large steps: a scheduler that resumes would start from there.
    optimizer = plain(name, lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch))
    optimizer.step()
    scheduler.step()
    SVAG(optimizer, 2)
    assert optimizer.param_groups[0]["initial_lr"] == pytest.approx(0.25, rel=1e-15)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.125, rel=1e-15)
    resumed = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch), 3)
    assert resumed.get_last_lr() == [pytest.approx(0.25 / 5, rel=1e-15)]


# An optimizer that has stepped


SECOND_MOMENTS = {"RMSprop": "square_avg", "Adam": "exp_avg_sq", "AdamW": "exp_avg_sq"}


@each_path
@each_ell
def test_states_are_rescaled(name: str, live: bool, ell: float) -> None:
    # Catches states of the large steps' noise and clock, and first moments that are scaled too.
    optimizer = stepped(name, **({"capturable": True} if live else {}))
    values, before, *_ = snapshot(optimizer)
    SVAG(optimizer, ell)
    assert_same_bits(snapshot(optimizer)[0], values)
    for p, old in zip(groups_of(optimizer), before, strict=True):
        state = dict(optimizer.state[p]) if p in optimizer.state else {}
        assert state.keys() == old.keys()
        assert state or name == "SGD"
        for key, value in state.items():
            factor = ell**2 if key in ("step", SECOND_MOMENTS[name]) else 1
            assert value.dtype == old[key].dtype and value.shape == old[key].shape
            torch.testing.assert_close(value, old[key] * factor, rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    ("ell", "backend"), [*((ell, "reference") for ell in ELLS), (3.5, "triton")]
)
@pytest.mark.parametrize("name", ADAPTIVE)
def test_goes_on_mid_run(name: str, ell: float, backend: str) -> None:
    # Catches a first step of SVAG that does not see the rescaled states, or a clock cut to whole
    # steps.
    optimizer = stepped(name, backend=backend)
    copies = [Parameter(p.detach().clone()) for p in groups_of(optimizer)]
    options = rescaled(name, ell, OPTIONS[name])
    oracle = getattr(torch.optim, name)(copies, **options, foreach=False)
    for p, q in zip(groups_of(optimizer), copies, strict=True):
        state = {key: value.clone() for key, value in optimizer.state[p].items()}
        state["step"] = state["step"] * ell**2
        state[SECOND_MOMENTS[name]] = state[SECOND_MOMENTS[name]] * ell**2
        oracle.state[q] = state
    svag = SVAG(optimizer, ell)
    for seed in (11, 13, 15):
        first, second = draw(copies, seed), draw(copies, seed + 1)
        svag_step(svag, first, second)
        give(copies, mix(name, ell, first, second))
        oracle.step()
    assert_same_state(optimizer, oracle, **EXACT)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_second_moments_keep_their_ratio_to_the_noise(name: str) -> None:
    # Catches a power of ell that the formulas leave consistent: with pure noise, sqrt(v) + eps
    # grows by ell, and the corrections of the averages stay where they were.
    optimizer = stepped(name)
    p = groups_of(optimizer)[0]
    group = optimizer.param_groups[0]
    decay = group["betas"][1] if "betas" in group else group["alpha"]
    root = optimizer.state[p][SECOND_MOMENTS[name]].sqrt() + group["eps"]
    correction = 1 - decay ** optimizer.state[p]["step"].item()
    SVAG(optimizer, 3)
    group = optimizer.param_groups[0]
    decay = group["betas"][1] if "betas" in group else group["alpha"]
    after = optimizer.state[p][SECOND_MOMENTS[name]].sqrt() + group["eps"]
    torch.testing.assert_close(after, 3 * root, rtol=1e-13, atol=0)
    assert 1 - decay ** optimizer.state[p]["step"].item() == pytest.approx(correction, rel=0.1)
