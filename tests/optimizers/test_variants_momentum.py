"""The three momentum forms of SGD: documents 002 (b, c, d) and 003 of the course notes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract import assert_same_bits
from marks import both_backends
from variants_by_hand import DEVICE, STEPS, Beside, eighths

import fusedopt

# With a state and every other option on and off at least once in each form.
FORMS: list[dict[str, Any]] = [
    {"momentum_form": "velocity"},
    {"momentum_form": "velocity", "nesterov": True},
    {"momentum_form": "velocity", "dampening": 0.3, "weight_decay": 0.1},
    {"momentum_form": "velocity", "dampening": 0.6, "weight_decay": 0.3, "maximize": True},
    {"momentum_form": "velocity", "nesterov": True, "weight_decay": 0.1, "maximize": True},
    {"momentum_form": "ema"},
    {"momentum_form": "ema", "nesterov": True},
    {"momentum_form": "ema", "weight_decay": 0.3, "maximize": True},
    {"momentum_form": "ema", "nesterov": True, "weight_decay": 0.1, "maximize": True},
    {"momentum_form": "torch", "dampening": 0.3, "weight_decay": 0.1},
    {"momentum_form": "torch", "nesterov": True, "weight_decay": 0.1, "maximize": True},
]


def _sets(**options: Any) -> list[dict[str, Any]]:
    return [{"lr": 0.1, "momentum": 0.8, **form, **options} for form in FORMS]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@both_backends
def test_every_form_beside_its_loop(backend: str, dtype: torch.dtype) -> None:
    # Catches a form taken for another, a missing lr or 1 - mu, a dampened or doubled first step,
    # Nesterov's look ahead with the wrong weights, decay or sign applied to the buffer.
    run = Beside("SGD", _sets(), backend=backend, dtype=dtype)
    for _ in range(4):  # also after the first step, where the forms differ the most
        run.step()
        run.check()
    run.step(STEPS - 4)
    run.check()


@both_backends
def test_first_steps(backend: str) -> None:
    # Catches the loop above being wrong: p = 1, g = 4 then 8, in numbers worked out by hand.
    # velocity: v = 0.5 * 4 = 2, p = -1;  v = 0.75 * 2 + 0.5 * 0.25 * 8 = 2.5, p = -3.5.
    # ema: m = 0.25 * 4 = 1, p = 0.5;  m = 0.75 + 2 = 2.75, p = 0.5 - 1.375.
    # nesterov, velocity: p = 1 - (2 + 0.75 * 2) = -2.5;  v = 1.5 + 4, p = -2.5 - (4 + 4.125).
    # nesterov, ema: p = 1 - 0.5 (1 + 0.75) = 0.125;  p = 0.125 - 0.5 (2 + 0.75 * 2.75).
    base = {"lr": 0.5, "momentum": 0.75}
    cases = [
        ({"momentum_form": "velocity", "dampening": 0.75}, [-1.0, -3.5], 2.5),
        ({"momentum_form": "ema"}, [0.5, -0.875], 2.75),
        ({"momentum_form": "velocity", "nesterov": True}, [-2.5, -10.625], 5.5),
        ({"momentum_form": "ema", "nesterov": True}, [0.125, -1.90625], 2.75),
    ]
    for options, values, buffer in cases:
        p = torch.nn.Parameter(torch.ones(2, device=DEVICE))
        optimizer = fusedopt.SGD([p], **base, **options, backend=backend)
        for gradient, value in zip((4.0, 8.0), values, strict=True):
            p.grad = torch.full_like(p, gradient)
            optimizer.step()
            assert p.tolist() == [value] * 2, options
        assert optimizer.state[p]["momentum_buffer"].tolist() == [buffer] * 2, options


@pytest.mark.parametrize("form", ["velocity", "ema"])
@both_backends
def test_without_momentum_every_form_is_plain_sgd(backend: str, form: str) -> None:
    # Catches a buffer that is made for nothing, and an average taken with mu = 0 in the wrong
    # place (lr or 1 - mu dropped).
    options = {"lr": 0.1, "weight_decay": 0.1, "maximize": True}
    ends = []
    for extra in ({}, {"momentum_form": form}):
        run = Beside("SGD", [{**options, **extra}], backend=backend)
        run.step(3)
        run.check()
        assert not any(run.optimizer.state.values())
        ends.append(run.params[0].detach().clone())
    assert_same_bits(ends[1], ends[0])


def _lr(step: int) -> float:
    return 0.2 / (1 + step)


def _scheduled(form: str, backend: str, **options: Any) -> Beside:
    sets = [{"lr": 0.2, "momentum": 0.8, "momentum_form": form, **options}]
    return Beside("SGD", sets, backend=backend)


@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
@both_backends
def test_velocity_is_torchs_form_at_constant_lr_only(backend: str, tensor: bool) -> None:
    # Row 002-b. Catches lr applied outside the velocity (then a schedule makes no difference),
    # and a buffer that is rescaled when lr changes.
    for options in ({}, {"dampening": 0.3, "weight_decay": 0.1}, {"nesterov": True}):
        constant, scheduled = [], []
        for form in ("torch", "velocity"):
            run = _scheduled(form, backend, **options)
            run.step(5)
            run.check()
            constant.append(run)
            run = _scheduled(form, backend, **options)
            if tensor:
                run.set(lr=torch.tensor(0.2, dtype=torch.float64, device=DEVICE))
            for step in range(5):
                if tensor:
                    run.optimizer.param_groups[0]["lr"].fill_(_lr(step))
                else:
                    run.set(lr=_lr(step))
                run.step()
                run.check()
            scheduled.append(run.params[0])
        (torchs, velocity), (p, q) = constant, scheduled
        torch.testing.assert_close(velocity.params[0], torchs.params[0], rtol=1e-12, atol=1e-12)
        buffers = [run.optimizer.state[run.params[0]]["momentum_buffer"] for run in constant]
        torch.testing.assert_close(buffers[1], 0.2 * buffers[0], rtol=1e-12, atol=1e-12)
        assert ((p - q).abs() > 0.01).double().mean() > 0.5


@both_backends
def test_velocity_under_a_scheduler_of_torch(backend: str) -> None:
    # Catches an lr that is read before the scheduler has set it.
    run = _scheduled("velocity", backend)
    scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer, step_size=1, gamma=0.5)
    for step in range(4):
        for loop in run.loops:
            loop.options["lr"] = 0.2 * 0.5**step
        run.step()
        scheduler.step()
    run.check()


@pytest.mark.parametrize("schedule", [False, True], ids=["constant", "schedule"])
@both_backends
def test_averaged_momentum_is_torchs_at_lr_times_one_minus_mu(backend: str, schedule: bool) -> None:
    # Rows 002-c and 002-d: lr_ema = lr_torch / (1 - mu). lr stands outside in both, so a schedule
    # keeps them together. Catches an average that does not start at 0, or is bias-corrected.
    for options in ({}, {"weight_decay": 0.1, "maximize": True}, {"nesterov": True}):
        runs = [_scheduled("torch", backend, **options), _scheduled("ema", backend, **options)]
        for step in range(6):
            lr = _lr(step) if schedule else 0.2
            runs[0].set(lr=lr)
            runs[1].set(lr=lr / (1 - 0.8))
            for run in runs:
                run.step()
        torchs, ema = (run.params[0] for run in runs)
        torch.testing.assert_close(ema, torchs, rtol=1e-12, atol=1e-12)
        buffers = [run.optimizer.state[run.params[0]]["momentum_buffer"] for run in runs]
        torch.testing.assert_close(buffers[1], (1 - 0.8) * buffers[0], rtol=1e-12, atol=1e-12)


@both_backends
def test_averaged_momentum_in_n_form(backend: str) -> None:
    # Row 003-a: v = N lr (average). Catches an average whose weights are not 1/N and 1 - 1/N.
    n, lr = 5, 0.01
    p = torch.nn.Parameter(eighths((4,), torch.float64, 1))
    value, average = p.detach().cpu().clone(), torch.zeros(4, dtype=torch.float64)
    optimizer = fusedopt.SGD(
        [p], lr=n * lr, momentum=1 - 1 / n, momentum_form="ema", backend=backend
    )
    velocity = torch.zeros_like(average)
    for step in range(6):
        p.grad = eighths((4,), torch.float64, 10 + step)
        optimizer.step()
        g = p.grad.cpu()
        average = (1 - 1 / n) * average + g / n
        velocity = (1 - 1 / n) * velocity + lr * g
        value -= n * lr * average
        torch.testing.assert_close(velocity, n * lr * average, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(p.detach().cpu(), value, rtol=1e-12, atol=1e-12)


@both_backends
def test_total_effect_of_one_gradient(backend: str) -> None:
    # Row 003-c: a single gradient moves p by lr g / (1 - mu) in all (ema: lr g). Catches an
    # impulse response with a wrong first weight or decay.
    mu, lr, g = 0.25, 0.1, 3.0
    for form, total in (("velocity", lr * g / (1 - mu)), ("ema", lr * g)):
        p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64, device=DEVICE))
        optimizer = fusedopt.SGD([p], lr=lr, momentum=mu, momentum_form=form, backend=backend)
        for step in range(22):
            p.grad = torch.full_like(p, g if step == 0 else 0.0)
            optimizer.step()
        torch.testing.assert_close(p.detach(), torch.full_like(p, -total), rtol=1e-12, atol=0)


@both_backends
def test_momentum_switched_on_and_changed_later(backend: str) -> None:
    # Catches mu, lr or 1 - mu kept from an earlier step, and a first step that is decided by the
    # optimizer's age instead of the buffer's.
    run = Beside(
        "SGD",
        [{"lr": 0.1, "momentum": 0.0, "momentum_form": f} for f in ("velocity", "ema")],
        backend=backend,
    )
    for momentum, lr in ((0.0, 0.1), (0.5, 0.1), (0.9, 0.05), (0.7, 0.2)):
        run.set(momentum=momentum, lr=lr)
        run.step()
        run.check()


@both_backends
def test_parameters_without_a_gradient(backend: str) -> None:
    # Catches a velocity that coasts on, or a first step counted for all parameters alike.
    run = Beside("SGD", _sets()[:6], backend=backend)
    for absent in ((0, 5), (1, 5), (), (2,)):
        gradients = [None if i in absent else g for i, g in enumerate(run.gradients())]
        run.give(gradients)
        run.optimizer.step()
        run.loops_step(gradients)
    run.check()
