"""Infinities, nans, zeros, and values near both ends of the range: as torch treats them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tolerances import (
    STEP,
    TRAJECTORY,
    assert_close_ulps,
    assert_untouched,
)
from torch import Tensor
from torch.nn import Parameter
from torch_registry import with_large_steps
from trajectory import Trajectory, describe

import fusedopt

# The interpreter computes with numpy, which warns of what is meant here.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

NAMES = ("SGD", "RMSprop", "Adam", "AdamW")
INF, NAN = torch.inf, torch.nan
# Squares of the largest are still finite: beyond that, torch's own result for centred RMSprop
# depends on whether the compiler contracted a product and a difference.
PARAMETERS = (0.0, -0.0, 1.5, -1e-3, 1e17, 1e-40, INF, -INF, NAN)
GRADIENTS = (0.0, -0.0, 2.5, -1e-3, -1e17, 1e-30, 1e-43, INF, -INF, NAN)
PAIRS = list(itertools.product(PARAMETERS, GRADIENTS))

# Beside torch's sets: terms that vanish must be absent, not multiplied by zero.
VANISHING: dict[str, list[dict[str, Any]]] = {
    "SGD": [{"lr": 0.1, "momentum": 0.0, "dampening": 0.5, "weight_decay": 0.0}],
    "RMSprop": [{"lr": 0.03, "eps": 0.0}, {"lr": 0.03, "alpha": 0.0}, {"lr": 0.03, "alpha": 1.0}],
    "Adam": [{"lr": 0.1, "eps": 0.0}, {"lr": 0.1, "betas": (0.0, 0.0)}],
    "AdamW": [{"lr": 0.1, "weight_decay": 0.0}, {"lr": 0.1, "betas": (0.0, 0.0)}],
}


def _steps(device: torch.device) -> list[Tensor]:
    """Every gradient at every parameter, then ordinary ones, then others again."""
    first = torch.tensor([g for _, g in PAIRS], device=device)
    return [first, torch.full_like(first, 0.5), first.flip(0)]


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", NAMES)
def test_special_values_as_in_torch(name: str, backend: str, device: torch.device) -> None:
    # Catches a term that is multiplied by zero instead of left out (0 * inf), a one-sided lerp,
    # a maximum that drops nans, and a nan that reaches a neighbour.
    option_sets = with_large_steps(name) + VANISHING[name]
    start = torch.tensor([p for p, _ in PAIRS], device=device)
    labels = [describe(options, {}) for options in option_sets]
    runs = []
    for module, extra in ((fusedopt, {"backend": backend}), (torch.optim, {"foreach": False})):
        groups = [
            {k: v for k, v in options.items() if k not in ("foreach", "fused")}
            | {"params": [Parameter(start.clone())]}
            for options in option_sets
        ]
        runs.append(Trajectory(getattr(module, name)(groups, **extra), labels))
    for gradient in _steps(device):
        for run in runs:
            run.step([gradient] * len(labels))
    _assert_same(runs[0], runs[1])


def _assert_same(ours: Trajectory, theirs: Trajectory) -> None:
    got, expected = ours.values(), theirs.values()
    assert got.keys() == expected.keys()
    for label, value in expected.items():
        largest = theirs.largest[label]
        assert_close_ulps(got[label], value, None, TRAJECTORY[value.dtype], label, scale=largest)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_amsgrad_keeps_a_nan(backend: str, device: torch.device) -> None:
    # Compiled code drops nans from a maximum unless told not to.
    p = Parameter(torch.ones(3, device=device))
    optimizer = fusedopt.Adam([p], lr=0.1, betas=(0.5, 0.5), amsgrad=True, backend=backend)
    for gradient in ([NAN, 2.0, 1.0], [1.0, 1.0, 1.0]):
        p.grad = torch.tensor(gradient, device=device)
        optimizer.step()
    largest = optimizer.state[p]["max_exp_avg_sq"]
    assert largest.isnan().tolist() == [True, False, False]
    assert largest[1:].tolist() == [2.0, 0.75]


def _almost_constant(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A gradient, and moments for which rounding makes s - a^2 negative."""
    gradient = torch.tensor([1.1, -0.7, 3.3, 1e-3], dtype=dtype, device=device)
    square = gradient.double().square()
    below = (square * (1 - 16 * torch.finfo(dtype).eps)).to(dtype)
    return gradient, gradient.clone(), below


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_centered_variance_is_cut_off_at_zero(
    backend: str, dtype: torch.dtype, momentum: float, device: torch.device
) -> None:
    # Where torch takes the root of a negative number, the denominator is eps alone: p - lr d/eps.
    gradient, mean, square = _almost_constant(dtype, device)
    ends = []
    for module, extra in ((fusedopt, {"backend": backend}), (torch.optim, {"foreach": False})):
        p = Parameter(torch.ones_like(gradient))
        arguments = {"lr": 0.5, "eps": 0.25, "centered": True, "momentum": momentum}
        optimizer = module.RMSprop([p], **arguments, **extra)
        p.grad = torch.zeros_like(gradient)
        optimizer.step()
        state = optimizer.state[p]
        state["square_avg"].copy_(square)
        state["grad_avg"].copy_(mean)
        p.grad = gradient
        optimizer.step()
        ends.append(p.detach())
    assert ends[1].isnan().all(), "torch does not reach the case that this test is about"
    start = torch.ones_like(gradient)
    assert_close_ulps(ends[0], start - 0.5 * gradient / 0.25, start, STEP[dtype], "parameter")


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_centered_with_a_constant_gradient_stays_finite(backend: str, device: torch.device) -> None:
    # The same from an ordinary start: in torch most of these are nan within 60 steps, and with
    # the default alpha within some 1200.
    gradient = torch.linspace(0.1, 3, 1000, device=device)
    ends = []
    for module, extra in ((fusedopt, {"backend": backend}), (torch.optim, {"foreach": False})):
        p = Parameter(torch.zeros_like(gradient))
        optimizer = module.RMSprop([p], lr=1e-3, alpha=0.5, centered=True, **extra)
        for _ in range(60):
            p.grad = gradient
            optimizer.step()
        ends.append(p.detach())
    healthy = ends[1].isfinite()
    assert 0.1 < healthy.double().mean() < 0.9
    assert ends[0].isfinite().all()
    assert (ends[0] < -1e-3).all()
    if backend == "reference" and device.type == "cpu":
        # Where torch's root exists throughout, the trajectory is torch's.
        assert torch.equal(ends[0][healthy], ends[1][healthy])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_centered_with_an_infinite_square(backend: str, device: torch.device) -> None:
    # The square overflows, the square of the mean does not: the denominator is infinite and the
    # parameter stays where it is.
    ends = []
    for module, extra in ((fusedopt, {"backend": backend}), (torch.optim, {"foreach": False})):
        p = Parameter(torch.ones(3, device=device))
        p.grad = torch.tensor([5e20, -5e20, 1.0], device=device)
        module.RMSprop([p], lr=0.1, centered=True, **extra).step()
        ends.append(p.detach())
    assert ends[1][:2].tolist() == [1.0, 1.0]
    assert_close_ulps(ends[0], ends[1], None, STEP[torch.float32], "parameter")


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", ["RMSprop", "Adam", "AdamW"])
def test_eps_of_zero_and_a_zero_gradient(name: str, backend: str, device: torch.device) -> None:
    # 0 / 0, as in torch; the neighbour takes a full step.
    p = Parameter(torch.ones(2, device=device))
    p.grad = torch.tensor([0.0, 1.0], device=device)
    getattr(fusedopt, name)([p], lr=0.125, eps=0.0, backend=backend).step()
    assert p.isnan().tolist() == [True, False]


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", ["RMSprop", "Adam", "AdamW"])
def test_float16_with_the_default_eps(name: str, backend: str, device: torch.device) -> None:
    # 1e-8 is zero in float16, and torch divides 0 by 0. Here eps is added in float32.
    p = Parameter(torch.ones(2, dtype=torch.float16, device=device))
    p.grad = torch.tensor([0.0, 1.0], dtype=torch.float16, device=device)
    options = {} if name == "RMSprop" else {"weight_decay": 0.0}
    getattr(fusedopt, name)([p], lr=0.125, **options, backend=backend).step()
    assert p[0].item() == 1.0
    assert p[1].item() < 1.0


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", NAMES)
def test_learning_rate_zero_leaves_every_bit(name: str, backend: str, device: torch.device) -> None:
    # Distributed checkpoints create an optimizer's state by such a step.
    types = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    special = torch.tensor([0.0, -0.0, 1e-7, 6e4, -1.0], device=device)
    values = [torch.cat((special, torch.randn(50, device=device))).to(t) for t in types]
    params = [Parameter(v.clone()) for v in values]
    optimizer = getattr(fusedopt, name)(params, lr=0.0, weight_decay=0.1, backend=backend)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, value in zip(params, values, strict=True):
        assert_untouched(p, value, str(value.dtype))
