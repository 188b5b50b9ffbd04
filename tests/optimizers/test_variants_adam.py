"""Adam's running mean and Adam without correction: document 000 of the course notes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from marks import both_backends
from variants_by_hand import DEVICE, STEPS, Beside, eighths

import fusedopt

# Horizons of 2.5 and 4 steps: both are passed, at different steps, and one is no whole number.
BASE: dict[str, Any] = {"lr": 0.1, "betas": (0.6, 0.75), "eps": 0.125}
PRODUCT: list[dict[str, Any]] = [
    {"bias_correction": correction, "amsgrad": amsgrad, "maximize": maximize, "weight_decay": decay}
    for correction, amsgrad, (maximize, decay) in itertools.product(
        ("adam", "running_mean", None), (False, True), ((False, 0.1), (True, 0.0))
    )
]


def _sets(**options: Any) -> list[dict[str, Any]]:
    return [{**BASE, **product, **options} for product in PRODUCT]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("Adam", torch.float64), ("AdamW", torch.float64), ("AdamW", torch.float32)],
    ids=["Adam-float64", "AdamW-float64", "AdamW-float32"],
)
@both_backends
def test_every_combination_beside_its_loop(backend: str, name: str, dtype: torch.dtype) -> None:
    # Catches one horizon for both moments, max in the place of min, a correction on top of the
    # running mean, half a correction where there should be none, the maximum over corrected
    # moments, decay in the wrong place, options that exclude each other in the kernel.
    run = Beside(name, _sets(), backend=backend, dtype=dtype)
    for steps in (1, 1, 1, STEPS - 3):
        run.step(steps)
        run.check()


@both_backends
def test_first_steps(backend: str) -> None:
    # Catches the loop above being wrong, in numbers worked out by hand: g = 8, then 4, then 0,
    # N = 2 for both, lr = eps = 1.
    # Running mean: m = 8, v = 64;  m = 6, v = 40;  k stays 1/2: m = 3, v = 20.
    # None: m = 4, v = 32;  m = 4, v = 24;  m = 2, v = 12.
    cases = [
        ("running_mean", [(8, 64), (6, 40), (3, 20)]),
        (None, [(4, 32), (4, 24), (2, 12)]),
    ]
    for correction, moments in cases:
        p = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64, device=DEVICE))
        optimizer = fusedopt.Adam(
            [p], lr=1.0, betas=(0.5, 0.5), eps=1.0, bias_correction=correction, backend=backend
        )
        value = 0.0
        for gradient, (m, v) in zip((8.0, 4.0, 0.0), moments, strict=True):
            p.grad = torch.full_like(p, gradient)
            optimizer.step()
            value -= m / (v**0.5 + 1)
            assert optimizer.state[p]["exp_avg"].tolist() == [m] * 2
            assert optimizer.state[p]["exp_avg_sq"].tolist() == [v] * 2
            assert p.tolist() == pytest.approx([value] * 2, rel=1e-14), correction


@pytest.mark.parametrize("capturable", [False, True], ids=["host", "capturable"])
@both_backends
def test_running_mean_is_the_plain_mean_up_to_the_horizon(backend: str, capturable: bool) -> None:
    # Row 000-f. Catches 1 / (t + 1), a horizon that is off by one, and moments that go on as plain
    # means after it or never do so.
    horizons = (4, 6)
    betas = tuple(1 - 1 / n for n in horizons)
    p = torch.nn.Parameter(eighths((5,), torch.float64, 1))
    optimizer = fusedopt.Adam(
        [p], lr=0.1, betas=betas, bias_correction="running_mean", capturable=capturable,
        backend=backend,
    )  # fmt: skip
    seen: list[torch.Tensor] = []
    moments = [torch.zeros(5, dtype=torch.float64)] * 2
    for t in range(1, 10):
        p.grad = eighths((5,), torch.float64, 10 + t)
        optimizer.step()
        seen.append(p.grad.cpu())
        state = optimizer.state[p]
        values = [state["exp_avg"].cpu(), state["exp_avg_sq"].cpu()]
        for i, (value, n, power) in enumerate(zip(values, horizons, (1, 2), strict=True)):
            mean = torch.stack(seen).pow(power).mean(0)
            moments[i] = (1 - 1 / n) * moments[i] + seen[-1].pow(power) / n if t > n else mean
            torch.testing.assert_close(value, moments[i], rtol=1e-12, atol=1e-12)
            if t > n + 1:
                assert (value - mean).abs().max() > 0.01


@both_backends
def test_running_mean_with_a_long_horizon(backend: str) -> None:
    # Catches 1 / (1 - beta) that is rounded to a whole number or to float32 too early: at the
    # default betas all steps here lie before the horizon.
    run = Beside("Adam", [{"lr": 0.1, "bias_correction": "running_mean"}], backend=backend)
    seen = []
    for _ in range(6):
        gradients = run.gradients()
        seen.append(gradients[0].cpu())
        run.give(gradients)
        run.optimizer.step()
        run.loops_step(gradients)
    run.check()
    mean = torch.stack(seen).square().mean(0)
    got = run.optimizer.state[run.params[0]]["exp_avg_sq"].cpu()
    torch.testing.assert_close(got, mean, rtol=1e-13, atol=0)


@both_backends
def test_moments_start_afresh_at_the_first_step(backend: str) -> None:
    # Document 000: the first running mean is x_1 whatever x_0. Catches beta = 0, whose horizon is
    # one step: every moment is the last gradient alone.
    sets = [
        {**BASE, "betas": b, "bias_correction": "running_mean"} for b in ((0.0, 0.9), (0.9, 0.0))
    ]
    run = Beside("Adam", sets, backend=backend)
    for _ in range(3):
        run.step()
        run.check()
    state = run.optimizer.state[run.params[0]]
    torch.testing.assert_close(state["exp_avg"], run.params[0].grad, rtol=0, atol=0)


@pytest.mark.parametrize("correction", ["adam", "running_mean", None])
@both_backends
def test_constant_gradients(backend: str, correction: str | None) -> None:
    # Row 002-g: the weights sum to 1 - beta^t (the running mean's to 1), and both corrections make
    # the average of a constant that constant. Catches the correction missing, doubled or left in
    # where it was switched off.
    g, eps, lr, betas = 3.0, 0.25, 0.1, (0.5, 0.8)
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64, device=DEVICE))
    optimizer = fusedopt.Adam(
        [p], lr=lr, betas=betas, eps=eps, bias_correction=correction, backend=backend
    )
    value = 0.0
    for t in range(1, 8):
        p.grad = torch.full_like(p, g)
        optimizer.step()
        state = optimizer.state[p]
        sums = [1.0 if correction == "running_mean" else 1 - b**t for b in betas]
        assert (state["exp_avg"] / g).tolist() == pytest.approx([sums[0]] * 3, rel=1e-12)
        assert (state["exp_avg_sq"] / g**2).tolist() == pytest.approx([sums[1]] * 3, rel=1e-12)
        m, v = (sums[0], sums[1]) if correction is None else (1.0, 1.0)
        value -= lr * m * g / (v**0.5 * g + eps)
        assert p.tolist() == pytest.approx([value] * 3, rel=1e-12)


@both_backends
def test_weights_of_an_average(backend: str) -> None:
    # Row 002-g: the gradient of tau steps ago counts (1 - beta) beta^tau. Catches beta and
    # 1 - beta changed about, and a decay that is applied twice.
    beta, steps = 0.7, 6
    p = torch.nn.Parameter(torch.zeros(steps, dtype=torch.float64, device=DEVICE))
    optimizer = fusedopt.Adam([p], betas=(beta, 0.9), bias_correction=None, backend=backend)
    for row in torch.eye(steps, dtype=torch.float64, device=DEVICE):
        p.grad = row.clone()
        optimizer.step()
    weights = optimizer.state[p]["exp_avg"].tolist()
    assert weights == pytest.approx([(1 - beta) * beta ** (steps - 1 - i) for i in range(steps)])
    assert sum(weights) == pytest.approx(1 - beta**steps, rel=1e-12)


@pytest.mark.parametrize("correction", ["adam", "running_mean", None])
@both_backends
def test_step_is_lr_over_eps_where_eps_dominates(backend: str, correction: str | None) -> None:
    # Row 000-g: with lr = eta0 eps the update does not change when eps is halved. Catches eps under
    # the root or scaled by a correction.
    ends = []
    for eps in (1.0, 0.5):
        p = torch.nn.Parameter(torch.zeros(6, dtype=torch.float64, device=DEVICE))
        optimizer = fusedopt.Adam(
            [p], lr=0.3 * eps, betas=(0.5, 0.9), eps=eps, bias_correction=correction,
            backend=backend,
        )  # fmt: skip
        for seed in range(3):
            p.grad = 1e-4 * eighths((6,), torch.float64, seed)
            optimizer.step()
            if seed == 0:
                first = 0.3 * p.grad * (0.5 if correction is None else 1.0)
                torch.testing.assert_close(-p.detach(), first, rtol=1e-3, atol=0)
        ends.append(p.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-3, atol=1e-8)
    assert ends[0].abs().max() > 1e-5


@both_backends
def test_late_steps(backend: str) -> None:
    # Catches min(t, N) taken in a type that does not hold t, and beta^t that underflows.
    counts = (10.0, 999.0, 123456.0, 2.0**24 - 2)
    for correction in ("running_mean", None):
        sets = [
            {**BASE, "betas": (0.9, beta), "bias_correction": correction}
            for beta in (0.95, 0.9999, 1 - 1e-7, 0.9999)
        ]
        run = Beside("Adam", sets, backend=backend)
        run.step()
        for p, loop, count in zip(run.params, run.loops, counts, strict=True):
            run.optimizer.state[p]["step"] = torch.tensor(count)
            loop.t = int(count)
        run.step()
        run.check()


@both_backends
def test_steps_are_counted_for_each_parameter(backend: str) -> None:
    # Catches one step count for all parameters: their running means have seen different numbers.
    sets = [{**BASE, "betas": (0.8, 0.9), "bias_correction": "running_mean"}] * 4
    run = Beside("AdamW", sets, backend=backend)
    for absent in ((0,), (1, 2), (1,), (3,), ()):
        gradients = [None if i in absent else g for i, g in enumerate(run.gradients())]
        run.give(gradients)
        run.optimizer.step()
        run.loops_step(gradients)
    run.check()


@pytest.mark.parametrize("capturable", [False, True], ids=["host", "capturable"])
@both_backends
def test_options_changed_between_steps(backend: str, capturable: bool) -> None:
    # Catches a correction, horizon or lr that is decided once.
    run = Beside("Adam", [{**BASE}] * 2, backend=backend, capturable=capturable)
    for options in (
        {"bias_correction": "running_mean"},
        {"betas": (0.8, 0.9), "lr": 0.05},
        {"bias_correction": None, "eps": 0.5},
        {"bias_correction": "adam"},
        {"bias_correction": "running_mean", "betas": (0.5, 0.5)},
    ):
        run.set(**options)
        run.step()
        run.check()
