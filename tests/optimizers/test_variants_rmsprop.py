"""RMSprop's bias correction and variance denominator: documents 000 and 002 of the course notes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from marks import both_backends
from torch import Tensor
from variants_by_hand import DEVICE, STEPS, Beside, eighths

import fusedopt

each_denominator = pytest.mark.parametrize("denominator", ["std", "variance"])

# eps is large, so that one in the wrong place shows.
BASE: dict[str, Any] = {"lr": 0.03, "alpha": 0.75, "eps": 0.25}
PRODUCT: list[dict[str, Any]] = [
    {"bias_correction": corrected, "denominator": denominator, "centered": centred, "momentum": mu}
    for corrected, denominator, centred, mu in itertools.product(
        (False, True), ("std", "variance"), (False, True), (0.0, 0.6)
    )
    if not (corrected and centred)  # refused: see the last test
]


def _sets(**options: Any) -> list[dict[str, Any]]:
    """Every combination, half of them with decay and the other way up."""
    more = ({"weight_decay": 0.125}, {"maximize": True, "weight_decay": 0.25}, {}, {})
    return [{**BASE, **o, **more[i % 4], **options} for i, o in enumerate(PRODUCT)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@both_backends
def test_every_combination_beside_its_loop(backend: str, dtype: torch.dtype) -> None:
    # Catches a wrong exponent of alpha, a correction under (or outside) the root or of one average
    # only, a square root left in the variance form, eps inside the root or divided by c, options
    # that exclude each other in the kernel.
    run = Beside("RMSprop", _sets(), backend=backend, dtype=dtype)
    for steps in (1, 1, STEPS - 2):
        run.step(steps)
        run.check()


@both_backends
def test_first_steps(backend: str) -> None:
    # Catches the loop above being wrong, in numbers worked out by hand: d = 8 then 2, alpha = 3/4,
    # eps = 1, lr = 5.
    # std, corrected: s = 16, s / (1/4) = 64, p = 1 - 5 * 8 / 9;  s = 12 + 1 = 13, s / (7/16).
    # variance: p = 1 - 40 / 17;  p -= 10 / 14.
    # variance, corrected: p = 1 - 40 / 65;  p -= 10 / (208/7 + 1).
    cases = [
        ({"bias_correction": True}, [1 - 40 / 9, 1 - 40 / 9 - 10 / ((208 / 7) ** 0.5 + 1)]),
        ({"denominator": "variance"}, [1 - 40 / 17, 1 - 40 / 17 - 10 / 14]),
        (
            {"denominator": "variance", "bias_correction": True},
            [1 - 40 / 65, 1 - 40 / 65 - 10 / (208 / 7 + 1)],
        ),
        # a = 2, then 1.5 + 0.5 = 2; s - a^2 = 12, then 9.
        ({"denominator": "variance", "centered": True}, [1 - 40 / 13, 1 - 40 / 13 - 10 / 10]),
    ]
    for options, values in cases:
        p = torch.nn.Parameter(torch.ones(2, dtype=torch.float64, device=DEVICE))
        optimizer = fusedopt.RMSprop([p], lr=5.0, alpha=0.75, eps=1.0, **options, backend=backend)
        for gradient, value in zip((8.0, 2.0), values, strict=True):
            p.grad = torch.full_like(p, gradient)
            optimizer.step()
            assert p.tolist() == pytest.approx([value] * 2, rel=1e-13), options


@both_backends
def test_horizon(backend: str) -> None:
    # Row 000-a, in the note's own letters: s <- (1 - 1/N) s + (1/N) g^2. Catches alpha and
    # 1 - alpha changed about.
    n, lr, eps = 8, 0.1, 0.01
    p = torch.nn.Parameter(eighths((5,), torch.float64, 1))
    value, s = p.detach().cpu().clone(), torch.zeros(5, dtype=torch.float64)
    optimizer = fusedopt.RMSprop([p], lr=lr, alpha=1 - 1 / n, eps=eps, backend=backend)
    for step in range(5):
        p.grad = eighths((5,), torch.float64, 10 + step)
        optimizer.step()
        g = p.grad.cpu()
        s = (1 - 1 / n) * s + (1 / n) * g**2
        value -= lr / (s.sqrt() + eps) * g
        torch.testing.assert_close(optimizer.state[p]["square_avg"].cpu(), s, rtol=1e-13, atol=0)
        torch.testing.assert_close(p.detach().cpu(), value, rtol=1e-12, atol=1e-12)


# Row 000-d: units


def _slope(p: Tensor) -> Tensor:
    """Of a loss that is neither linear nor quadratic."""
    return p.detach() ** 3 + torch.sin(3 * p.detach()) + 0.3


def _descend(c: float, backend: str, eps: float, decay: float, **options: Any) -> Tensor:
    """Minimise the loss as a function of q = c p, and return the path of q / c."""
    p = torch.nn.Parameter(c * eighths((6,), torch.float64, 3))
    optimizer = fusedopt.RMSprop(
        [p], lr=0.05, alpha=0.7, eps=eps, weight_decay=decay, backend=backend, **options
    )
    path = []
    for _ in range(6):
        p.grad = _slope(p / c) / c
        optimizer.step()
        path.append(p.detach() / c)
    return torch.stack(path)


UNITS: list[dict[str, Any]] = [
    {},
    {"bias_correction": True},
    {"centered": True, "momentum": 0.5},
    {"bias_correction": True, "momentum": 0.5, "maximize": True},
]


@both_backends
def test_variance_denominator_is_free_of_the_parameters_unit(backend: str) -> None:
    # Catches a square root, an eps that is added to a root, a factor of the wrong dimension. (A
    # decay has the units of eps.)
    c = 7.0
    for options in UNITS:
        options = {**options, "denominator": "variance"}
        path = _descend(1.0, backend, 0.2, 0.1, **options)
        other = _descend(c, backend, 0.2 / c**2, 0.1 / c**2, **options)
        torch.testing.assert_close(other, path, rtol=1e-9, atol=1e-9)
        assert (path[-1] - path[0]).abs().min() > 1e-3


@both_backends
def test_std_denominator_depends_on_the_parameters_unit(backend: str) -> None:
    # Of the test above: catches it passing for whatever the denominator is.
    c = 7.0
    path = _descend(1.0, backend, 0.2, 0.0)
    for eps in (0.2 / c, 0.2 / c**2):
        other = _descend(c, backend, eps, 0.0)
        assert (other - path).abs().max() > 0.1


@both_backends
def test_std_step_is_lr_over_eps_where_eps_dominates(backend: str) -> None:
    # Row 000-g: with lr = eta0 eps the step is eta0 g, whatever eps. Catches eps under the root
    # (lr / sqrt(eps)) and an eps that is corrected for bias.
    eta0, small = 0.3, 1e-4
    for corrected in (False, True):
        moved = []
        for eps in (1.0, 0.5):
            p = torch.nn.Parameter(torch.zeros(6, dtype=torch.float64, device=DEVICE))
            optimizer = fusedopt.RMSprop(
                [p], lr=eta0 * eps, eps=eps, bias_correction=corrected, backend=backend
            )
            p.grad = small * eighths((6,), torch.float64, 5)
            optimizer.step()
            moved.append(-p.detach())
        torch.testing.assert_close(moved[0], eta0 * p.grad, rtol=1e-3, atol=0)
        torch.testing.assert_close(moved[0], moved[1], rtol=1e-3, atol=0)


# Row 002-e: bias correction


@each_denominator
@both_backends
def test_bias_correction_makes_constant_gradients_exact(backend: str, denominator: str) -> None:
    # Row 002-g: the weights (1 - alpha) alpha^tau sum to 1 - alpha^t, and divided by it the average
    # of a constant is that constant, from the first step on. Catches t counted from 0 or from 2.
    g, eps, lr = 3.0, 0.25, 0.1
    root = g if denominator == "std" else g**2
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64, device=DEVICE))
    optimizer = fusedopt.RMSprop(
        [p], lr=lr, alpha=0.9, eps=eps, denominator=denominator, bias_correction=True,
        backend=backend,
    )  # fmt: skip
    for t in range(1, 8):
        p.grad = torch.full_like(p, g)
        optimizer.step()
        expected = torch.full_like(p, -t * lr * g / (root + eps))
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=0)
        weights = optimizer.state[p]["square_avg"] / g**2
        torch.testing.assert_close(weights, torch.full_like(p, 1 - 0.9**t), rtol=1e-12, atol=0)


@both_backends
def test_late_steps(backend: str) -> None:
    # Catches 1 - alpha^t where alpha^t is tiny, or where t is large and alpha near 1.
    counts = (10.0, 999.0, 123456.0, 2.0**24 - 2)
    sets = [{**BASE, "alpha": a, "bias_correction": True} for a in (0.75, 0.99, 0.9999, 0.999)]
    run = Beside("RMSprop", sets, backend=backend)
    run.step()
    for p, loop, count in zip(run.params, run.loops, counts, strict=True):
        run.optimizer.state[p]["step"] = torch.tensor(count)
        loop.t = int(count)
    run.step()
    run.check()


@both_backends
def test_steps_are_counted_for_each_parameter(backend: str) -> None:
    # Catches one step count for all parameters of a group or of the optimizer.
    run = Beside("RMSprop", [{**BASE, "bias_correction": True}] * 4, backend=backend)
    for absent in ((0,), (1, 2), (1,), (3,), ()):
        gradients = [None if i in absent else g for i, g in enumerate(run.gradients())]
        run.give(gradients)
        run.optimizer.step()
        run.loops_step(gradients)
    run.check()


@both_backends
def test_options_changed_between_steps(backend: str) -> None:
    # Catches a form or a correction that is decided once. The averages are the same in all.
    run = Beside("RMSprop", [BASE] * 2, backend=backend)
    for options in (
        {"bias_correction": True},
        {"denominator": "variance", "alpha": 0.6},
        {"bias_correction": False, "eps": 0.5},
        {"denominator": "std", "alpha": 0.9, "bias_correction": True},
    ):
        run.set(**options)
        run.step()
        run.check()


# Centred


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@both_backends
def test_no_variance_is_no_negative_one(backend: str, momentum: float) -> None:
    # s - a^2 of nearly equal gradients is rounding noise of either sign. Catches the cut at 0 being
    # missing: below -eps, the variance form would climb.
    options = {**BASE, "denominator": "variance", "centered": True, "momentum": momentum}
    run = Beside("RMSprop", [options], backend=backend)
    run.step()
    state, (loop,) = run.optimizer.state[run.params[0]], run.loops
    for key, value in (("square_avg", 1.0), ("grad_avg", 2.0)):
        state[key].fill_(value)
        loop.state[key].fill_(value)
    before = run.params[0].detach().clone()
    run.give([torch.full_like(run.params[0], 2.0)])
    run.optimizer.step()
    run.loops_step([run.params[0].grad])
    assert (state["square_avg"] - state["grad_avg"].square() < -options["eps"]).all()
    run.check()
    if momentum == 0:
        step = torch.full_like(before, options["lr"] * 2 / options["eps"])
        torch.testing.assert_close(before - run.params[0].detach(), step, rtol=1e-12, atol=0)


def test_corrected_and_centred_is_refused() -> None:
    # One gradient has no variance: the first step would be lr d / eps, 1e8 at the defaults. Catches
    # it being taken, from any side.
    def param() -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.ones(2, device=DEVICE))

    both = {"bias_correction": True, "centered": True}
    with pytest.raises(ValueError, match="centered"):
        fusedopt.RMSprop([param()], **both)
    # Of a whole batch, or of one sample, a decoupled moment is no more than that.
    with pytest.raises(ValueError, match="centered"):
        fusedopt.BatchDecoupledRMSprop([param()], statistics=fusedopt.GradSampleSquares(), **both)
    with pytest.raises(ValueError, match="centered"):
        fusedopt.RMSprop([{"params": [param()], "centered": True}], bias_correction=True)
    optimizer = fusedopt.RMSprop([param()], centered=True)
    with pytest.raises(ValueError, match="centered"):
        optimizer.add_param_group({"params": [param()], "bias_correction": True})
    assert len(optimizer.param_groups) == 1
    # Set between steps, or loaded.
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2, device=DEVICE)
    optimizer.param_groups[0]["bias_correction"] = True
    with pytest.raises(ValueError, match="centered"):
        optimizer.step()
    assert not optimizer.state
    with pytest.raises(ValueError, match="centered"):
        fusedopt.RMSprop([param()]).load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["bias_correction"] = False
    # A group may leave one of them out.
    optimizer.add_param_group({"params": [param()], "bias_correction": True, "centered": False})
