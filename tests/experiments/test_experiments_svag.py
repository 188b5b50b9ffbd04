"""The experiment on SVAG at reduced size, its solver of SDEs, and what makes its claims fail."""

from __future__ import annotations

import copy
import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fusedopt
from fusedopt import scaling

ROOT = Path(__file__).resolve().parents[2]
HYPER: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1},
    "RMSprop": {"lr": 0.2, "alpha": 0.96, "eps": 1.0},
    "Adam": {"lr": 0.2, "betas": (0.9, 0.96), "eps": 1.0},
}


@pytest.fixture(scope="module", autouse=True)
def _checkout() -> Iterator[None]:
    """Make experiments importable, which no installation has."""
    sys.path.insert(0, str(ROOT))
    yield
    sys.path.remove(str(ROOT))


def module(name: str) -> ModuleType:
    return importlib.import_module(f"experiments.{name}")


@pytest.mark.slow
def test_reduced_run(tmp_path: Path) -> None:
    # Catches: an optimizer, SVAG or a rule for the batch size that does not have the SDE's means;
    # test_claims_fail has the mistakes one by one.
    arguments = ["svag", "--reduced", "--out", str(tmp_path)]
    assert module("__main__").main(arguments) == 0
    assert (tmp_path / "svag.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((tmp_path / "svag.json").read_text())["figures"]
    for kind, entry in figures["near"].items():
        finer = "2" if kind == "SGD" else "4"
        for errors in entry["weak_error"].values():
            # The noise is normal and the Brownian motion the same: so is SVAG's path.
            assert errors["SVAG 2"][0] == pytest.approx(errors[finer][0], rel=1e-4)
    noise, signal = figures["digits"]["noise"], figures["digits"]["signal"]
    assert min(noise["noise_scale"]) > 20 and signal["distance"]["2"] > noise["distance"]["2"]


class Constant:
    """A gradient whose mean and noise are the same everywhere."""

    def __init__(self, slope: float, spread: float) -> None:
        self._slope, self._spread = slope, spread

    def slope(self, theta: torch.Tensor) -> torch.Tensor:
        return torch.full_like(theta, self._slope)

    def spread(self, theta: torch.Tensor) -> torch.Tensor:
        return torch.full_like(theta, self._spread)


class Linear(Constant):
    def slope(self, theta: torch.Tensor) -> torch.Tensor:
        return self._slope * theta


def increments(steps: int, replicas: int, dt: float) -> torch.Tensor:
    """Return increments with their negatives, so that means of what is linear are exact."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(steps, replicas // 2, 1, generator=generator, dtype=torch.float64)
    return torch.cat([half, -half], 1) * math.sqrt(dt)


@pytest.mark.parametrize("time", [0.5, 2.0])
def test_solver_on_ornstein_uhlenbeck(time: float) -> None:
    # Catches: dt for its root or twice the drift in the solver, a lost sigma0 in SGD's equation.
    sde, rate, noise, steps = module("sde"), 1.5, 0.6, 400
    equation = sde.sgd(Linear(rate, 2.0), sde.Constants(0.1, noise / 2.0))
    dw = increments(steps, 20_000, time / steps)
    (x,) = sde.euler_maruyama(equation, (3.0 + torch.zeros_like(dw[0]),), 0.0, time / steps, dw)
    assert x.mean().item() == pytest.approx(3.0 * math.exp(-rate * time), rel=0.02)
    variance = noise**2 / (2 * rate) * (1 - math.exp(-2 * rate * time))
    assert x.var().item() == pytest.approx(variance, rel=0.04)


def test_solver_is_of_first_order() -> None:
    # Catches: a step count or a time that is off by one, which no mean of many steps shows.
    sde = module("sde")
    equation = sde.sgd(Linear(1.0, 0.0), sde.Constants(0.1, 1.0))
    start = (torch.ones(1, 1, dtype=torch.float64),)
    for steps in (1, 2, 8):
        dw = torch.zeros(steps, 1, 1, dtype=torch.float64)
        (x,) = sde.euler_maruyama(equation, start, 0.0, 1 / steps, dw)
        assert x.item() == pytest.approx((1 - 1 / steps) ** steps)


def test_rmsprop_equation() -> None:
    # Catches: eps0 left out, noise not divided by P, u towards the root of Sigma.
    sde, time, steps = module("sde"), 1.0, 200
    c = sde.Constants(0.04, 0.8, 0.2, (1.0,))
    dw = increments(steps, 20_000, time / steps)
    zeros = torch.zeros_like(dw[0])
    equation = sde.rmsprop(Constant(0.7, 1.5), c)
    x, u = sde.euler_maruyama(equation, (zeros, zeros + 2.25), 0.0, time / steps, dw)
    assert x.mean().item() == pytest.approx(-0.7 / (0.8 * 1.5 + 0.2))
    assert x.std().item() == pytest.approx(0.8 * 1.5 / (0.8 * 1.5 + 0.2), rel=0.02)
    assert torch.allclose(u, zeros + 2.25)
    _, u = sde.euler_maruyama(equation, (zeros, zeros), 0.0, time / steps, dw)
    assert u.mean().item() == pytest.approx(2.25 * (1 - math.exp(-1.0)), rel=0.01)


def test_adam_equation() -> None:
    # Catches: a bias correction left out or of the other average, rates in the wrong order.
    sde, begin, time, steps = module("sde"), 0.4, 1.0, 500
    c = sde.Constants(0.04, 0.8, 0.2, (2.5, 1.0))
    bias1, bias2 = 1 - math.exp(-2.5 * begin), 1 - math.exp(-begin)
    dw = increments(steps, 20_000, time / steps)
    zeros = torch.zeros_like(dw[0])
    state = zeros, zeros + 0.7 * bias1, zeros + 2.25 * bias2
    equation = sde.adam(Constant(0.7, 1.5), c)
    x, m, u = sde.euler_maruyama(equation, state, begin, time / steps, dw)
    end = begin + time
    # Corrected, both averages are what they are averages of, all the time.
    assert x.mean().item() == pytest.approx(-0.7 / (0.8 * 1.5 + 0.2), rel=0.005)
    assert m.mean().item() == pytest.approx(0.7 * (1 - math.exp(-2.5 * end)), rel=0.005)
    assert u.mean().item() == pytest.approx(2.25 * (1 - math.exp(-end)), rel=0.005)
    variance = 2.5 * (0.8 * 1.5) ** 2 / 2 * (1 - math.exp(-2 * 2.5 * time))
    assert m.var().item() == pytest.approx(variance, rel=0.04)


@pytest.mark.parametrize("kind", HYPER)
@pytest.mark.parametrize("ell", [1, 2, 3])
def test_one_equation_for_every_batch_and_ell(kind: str, ell: int) -> None:
    # Catches: a constant with lr for lr^2, 1 - beta not over the step, a rule with lr kappa.
    sde, hyper, sigma = module("sde"), HYPER[kind], 4.0
    expected = sde.constants(kind, hyper, sigma)
    steps = module("noisy_quadratic").steps_per_step(kind, ell)
    rule = "linear" if kind == "SGD" else "sqrt"
    parameter = torch.nn.Parameter(torch.ones(2))
    svag = fusedopt.SVAG(getattr(fusedopt, kind)([parameter], **hyper), ell=ell)
    for new in (scaling.rescale(hyper, steps, 1, rule), svag.optimizer.param_groups[0]):
        found = sde.constants(kind, new, sigma * math.sqrt(steps))
        assert found.step == pytest.approx(expected.step / steps)
        assert found.noise == pytest.approx(expected.noise)
        assert found.eps == pytest.approx(expected.eps)
        assert found.rates == pytest.approx(expected.rates)


def test_start_is_the_same_for_all() -> None:
    # Catches: a state that SVAG or the rule for the batch size leaves as it was, or loaded in units
    # of another sigma.
    quadratic, weak = module("noisy_quadratic"), module("weak_error")
    zeros = torch.zeros(2, 4, dtype=torch.float64)
    for kind in HYPER:
        setting = weak.setting_of(module("svag").FULL, kind, 1.0)
        runs = weak._runs(setting, zeros, 8, [1, 4], [2])
        first, *others = (run.functions() for run in runs.values())
        assert len(first) == (3 if kind == "SGD" else 4)
        for other in others:
            assert torch.allclose(first, other, rtol=1e-12)
        assert isinstance(runs["SVAG 2"], quadratic.Amplified)


def test_statistics_of_weak_errors() -> None:
    # Catches: chance that counts as an error, a jackknife without its factor, a slope of lr itself.
    weak = module("weak_error")
    noise = torch.randn(4000, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert weak.weak_error(0.5 + noise).item() == pytest.approx(0.5, abs=0.02)
    assert weak.weak_error(noise).item() < 0.3 / math.sqrt(4000)
    value, error = weak.jackknife(lambda chunks: chunks.mean(), noise[:, 0])
    assert value == pytest.approx(noise[:, 0].mean().item())
    assert error == pytest.approx(noise[:, 0].std().item() / math.sqrt(4000))
    x = torch.tensor([1.0, 0.5, 0.25])
    assert weak.slope(x, 3 * x.square()).item() == pytest.approx(2.0, rel=1e-5)


def small(kind: str) -> dict[str, Any]:
    """Return the summary of one optimizer, near the minimum, at a size of a second."""
    svag, weak = module("svag"), module("weak_error")
    changes = {"replicas": 1500, "steps": 20, "every": 5, "finest": 8, "device": "cpu"}
    settings = {**copy.deepcopy(svag.FULL), **changes}
    setting = weak.setting_of(settings, kind, settings["start"])
    return weak.summary(setting, weak.measure(settings, setting, [1, 2, 4], [2], 3), settings)


def worst_slope(entry: dict[str, Any]) -> float:
    return max(abs(slope - 1) for slope, _ in entry["slope"].values())


def test_claims_hold_without_mistakes() -> None:
    # The other side of test_svag_claim_fails and test_slope_claim_fails.
    for kind in HYPER:
        entry = small(kind)
        assert module("svag")._amplified(entry) < 1.2 and worst_slope(entry) < 0.2, kind


def _group(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Any], None]:
    def apply(svag: Any) -> None:
        for group in svag.optimizer.param_groups:
            group.update(change(group))

    return apply


def _weights(svag: Any) -> None:
    # Those for SGD.
    root = math.sqrt(2 * svag.ell - 1)
    svag._pair.weights = (1 + root) / 2, (1 - root) / 2


def _mean_of_both(svag: Any) -> None:
    svag._pair.weights = 0.5, 0.5


SVAG_MISTAKES: dict[str, tuple[str, Callable[[Any], None]]] = {
    "weights of SGD": ("Adam", _weights),
    "mean of both gradients": ("SGD", _mean_of_both),
    "lr as before": ("RMSprop", _group(lambda group: {"lr": group["lr"] * 2})),
    "eps as before": ("RMSprop", _group(lambda group: {"eps": 1.0})),
    "Adam's eps as before": ("Adam", _group(lambda group: {"eps": 1.0})),
    "alpha as before": ("RMSprop", _group(lambda group: {"alpha": 0.96})),
    "betas as before": ("Adam", _group(lambda group: {"betas": (0.9, 0.96)})),
}


@pytest.mark.parametrize("mistake", SVAG_MISTAKES)
def test_svag_claim_fails(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Catches: a claim on SVAG that holds whatever SVAG does.
    kind, put_in = SVAG_MISTAKES[mistake]
    right = fusedopt.SVAG

    def wrong(*arguments: Any, **keywords: Any) -> Any:
        made = right(*arguments, **keywords)
        put_in(made)
        return made

    monkeypatch.setattr(fusedopt, "SVAG", wrong)
    assert module("svag")._amplified(small(kind)) > 1.5


EQUATION_MISTAKES: dict[str, tuple[str, dict[str, Any]]] = {
    "no eps": ("RMSprop", {"eps": 0.0}),
    "sigma for sigma0": ("SGD", {"noise": 2.0}),
    "alpha's rate off by 20 %": ("RMSprop", {"rates": (1.2,)}),
    "rates swapped": ("Adam", {"rates": (1.0, 2.5)}),
}


@pytest.mark.parametrize("mistake", EQUATION_MISTAKES)
def test_slope_claim_fails(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Catches: a slope of 1 between whatever two processes.
    sde, (kind, changes) = module("sde"), EQUATION_MISTAKES[mistake]
    right = sde.EQUATIONS[kind]

    def wrong(oracle: Any, constants: Any) -> Any:
        return right(oracle, sde.Constants(**{**vars(constants), **changes}))

    monkeypatch.setitem(sde.EQUATIONS, kind, wrong)
    assert worst_slope(small(kind)) > 0.3


def test_slope_claim_fails_for_another_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    # Catches: refinements that are not what the rule for the batch size makes of them.
    monkeypatch.setitem(module("noisy_quadratic")._RULES, "Adam", "linear")
    assert worst_slope(small("Adam")) > 0.3
