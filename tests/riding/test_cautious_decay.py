"""Cautious weight decay: against loops by hand in float64, element by element."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from marks import both_backends

import fusedopt

START = [2.0, -3.0, 0.5, -0.25, 0.0, 1e-30, -1e-30, 4.0]
STEPS = 6


def gradients() -> list[list[float]]:
    """Signs against and along the parameters', changing while momentum has not, and zeros."""
    generator = torch.Generator().manual_seed(7)
    found = torch.randn(STEPS, len(START), generator=generator, dtype=torch.float64)
    found[:, 5] = found[:, 5].abs() * 1e-30
    found[:, 6] = found[:, 6].abs() * 1e-30
    found[:, 7] = 0.0
    return [list(map(float, row)) for row in found]


def decayed(p: float, u: float, lr: float, decay: float) -> float:
    """The paper's step, with exact signs."""
    agrees = u == 0 or p == 0 or (u > 0) == (p > 0)
    return p - lr * (u + (decay * p if agrees else 0.0))


def adamw_by_hand(lr: float, decay: float, sign: float, amsgrad: bool) -> list[float]:
    b1, b2, eps = 0.8, 0.9, 1e-3
    values = list(START)
    m, v, top = ([0.0] * len(START) for _ in range(3))
    for t, row in enumerate(gradients(), start=1):
        for i, g in enumerate(row):
            g *= sign
            m[i] = b1 * m[i] + (1 - b1) * g
            v[i] = b2 * v[i] + (1 - b2) * g * g
            top[i] = max(top[i], v[i])
            second = top[i] if amsgrad else v[i]
            u = m[i] / (1 - b1**t) / ((second / (1 - b2**t)) ** 0.5 + eps)
            values[i] = decayed(values[i], u, lr, decay)
    return values


def sgd_by_hand(lr: float, decay: float, sign: float, form: str, nesterov: bool) -> list[float]:
    mu = 0.75
    values, buffer = list(START), [0.0] * len(START)
    for t, row in enumerate(gradients()):
        for i, g in enumerate(row):
            g *= sign
            if form == "ema":
                buffer[i] = mu * buffer[i] + (1 - mu) * g
                u = (1 - mu) * g + mu * buffer[i] if nesterov else buffer[i]
            else:
                # With one lr, a velocity is the buffer times that.
                buffer[i] = mu * buffer[i] + g if t else g
                u = g + mu * buffer[i] if nesterov else buffer[i]
            values[i] = decayed(values[i], u, lr, decay)
    return values


def run(kind: Any, backend: str, **options: Any) -> torch.Tensor:
    p = torch.nn.Parameter(torch.tensor(START, dtype=torch.float64))
    optimizer = kind([p], backend=backend, cautious_weight_decay=True, **options)
    for row in gradients():
        p.grad = torch.tensor(row, dtype=torch.float64)
        optimizer.step()
    return p.detach()


def assert_by_hand(found: torch.Tensor, wanted: list[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=0)


@both_backends
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_adamw(backend: str, maximize: bool, amsgrad: bool) -> None:
    """Catches the gradient's sign in the place of the update's, and decay of what was updated."""
    found = run(
        fusedopt.AdamW, backend, lr=0.3, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.5,
        maximize=maximize, amsgrad=amsgrad,
    )  # fmt: skip
    assert_by_hand(found, adamw_by_hand(0.3, 0.5, -1.0 if maximize else 1.0, amsgrad))


@both_backends
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("form", fusedopt.SGD.choices["momentum_form"])
def test_sgd(backend: str, form: str, nesterov: bool) -> None:
    """Catches decay that goes into the buffer, and one of 1 instead of lr in a velocity."""
    found = run(
        fusedopt.SGD, backend, lr=0.3, momentum=0.75, weight_decay=0.5, nesterov=nesterov,
        momentum_form=form, maximize=True,
    )  # fmt: skip
    assert_by_hand(found, sgd_by_hand(0.3, 0.5, -1.0, form, nesterov))


@both_backends
@pytest.mark.parametrize("kind", [fusedopt.AdamW, fusedopt.SGD])
def test_signs_of_what_has_no_product(kind: Any, backend: str) -> None:
    """Parameter and step are of two signs, and their product in float32 is -0."""
    p = torch.nn.Parameter(torch.tensor([1e-24, 1e-24]))
    p.grad = torch.tensor([-1e-32, 1e-32])
    optimizer = kind([p], lr=0.5, weight_decay=1.0, backend=backend, cautious_weight_decay=True)
    optimizer.step()
    without = torch.nn.Parameter(torch.tensor([1e-24, 1e-24]))
    without.grad = p.grad.clone()
    kind([without], lr=0.5, weight_decay=0.0, backend=backend).step()
    assert p[0] == without[0] and p[1] < without[1]


@both_backends
def test_infinite_parameters_without_decay(backend: str) -> None:
    """Catches 0 * inf."""
    p = torch.nn.Parameter(torch.tensor([torch.inf]))
    p.grad = torch.ones(1)
    fusedopt.SGD([p], lr=0.5, weight_decay=0.0, backend=backend, cautious_weight_decay=True).step()
    assert p.item() == torch.inf


@both_backends
def test_by_group_and_in_the_middle(backend: str) -> None:
    """An entry of the groups: in one of two, and switched between steps, as a state dict has it."""
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    groups = [{"params": params[:1]}, {"params": params[1:], "cautious_weight_decay": True}]
    optimizer = fusedopt.AdamW(groups, lr=0.1, weight_decay=1.0, backend=backend)
    for p in params:
        p.grad = -torch.ones(2)
    optimizer.step()
    # 1 + lr, with a tenth decayed first or not.
    assert params[0][0] < 1.05 < params[1][0]
    optimizer.param_groups[0]["cautious_weight_decay"] = True
    before = params[0].detach().clone()
    optimizer.step()
    assert (params[0] - before > 0.09).all()
    other = fusedopt.AdamW([{"params": [p]} for p in params], backend=backend)
    other.load_state_dict(optimizer.state_dict())
    assert [g["cautious_weight_decay"] for g in other.param_groups] == [True, True]


def test_refusals() -> None:
    p = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="cautious_weight_decay=True is for decoupled decay"):
        fusedopt.Adam([p], cautious_weight_decay=True)
    fusedopt.Adam([p], cautious_weight_decay=True, decoupled_weight_decay=True)
    with pytest.raises(ValueError, match="cautious_weight_decay must be one of False, True, got 1"):
        fusedopt.AdamW([p], cautious_weight_decay=1)
    with pytest.raises(ValueError, match="SVAG's theory covers only cautious_weight_decay=False"):
        fusedopt.SVAG(fusedopt.SGD([p], cautious_weight_decay=True), ell=2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'cautious_weight_decay'"):
        fusedopt.RMSprop([p], cautious_weight_decay=True)
