"""The experiments on the lecture notes at reduced size, and the mistakes that make them fail."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.progress import Progress

import fusedopt
from fusedopt import scaling

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def _checkout() -> Iterator[None]:
    """Make experiments importable, which no installation has."""
    sys.path.insert(0, str(ROOT))
    yield
    sys.path.remove(str(ROOT))


def module(name: str) -> ModuleType:
    return importlib.import_module(f"experiments.{name}")


def run(name: str, folder: Path) -> dict[str, Any]:
    """Run an experiment in this process; return its figures."""
    assert module("__main__").main([name, "--reduced", "--out", str(folder)]) == 0
    picture = (folder / f"{name}.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    figures: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())["figures"]
    return figures


def failing(name: str, **changes: Any) -> list[str]:
    """Run an experiment at reduced size with changed settings; return the claims that fail."""
    experiment = module(name)
    settings = {**experiment.FULL, **experiment.REDUCED, "device": "cpu", **changes}
    figures = experiment.run(settings, Progress(disable=True))
    stated = experiment.claims({"settings": settings, "figures": figures})
    return [text for text, _, _, holds in stated if not holds]


@pytest.mark.slow
def test_temperature(tmp_path: Path) -> None:
    # Catches: a momentum, an lr or a noise that is not the one that theory has;
    # test_temperature_fails has the mistakes one by one.
    figures = run("temperature", tmp_path)
    assert len(figures["cells"]) == 8
    for cell in figures["cells"]:
        assert cell["standard_error"] < 0.03 * cell["loss"]
        if cell["rule"]:
            assert cell["loss"] == pytest.approx(figures["first_order"], rel=0.08)
    # One step with momentum 0.9 is a tenth of the effect, whatever the batch size.
    slow = [entry["over_eta0"] for entry in figures["total"] if entry["momentum"] == 0.9]
    assert [path["1"] for path in slow] == [pytest.approx(0.1)] * 2
    assert [path["2"] for path in slow] == [pytest.approx(0.19)] * 2


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_lyapunov_equation_of_the_noisy_quadratic(momentum: float) -> None:
    # Catches: a transition or a kick that is not the optimizer's, which the measured losses would
    # only show as a wrong optimizer.
    settings = {"curvatures": [0.7], "variances": [3.0]}
    cell = {"lr": 0.2, "momentum": momentum, "batch": 4}
    # Known in closed form: lr sigma^2 / h B, times (1 + mu) / (1 - mu) (2 (1 + mu) - lr h).
    factor = (1 + momentum) / ((1 - momentum) * (2 * (1 + momentum) - 0.14))
    variance = 0.2 * 3.0 / (0.7 * 4) * factor
    exact = module("temperature")._exact(settings, cell)
    assert exact == pytest.approx(0.7 * variance / 2, rel=1e-12)


RULES: dict[str, Callable[[float, float, int], float]] = {
    "lr = B eta0": lambda eta0, momentum, batch: batch * eta0,
    "lr = (1 - mu) eta0": lambda eta0, momentum, batch: (1 - momentum) * eta0,
    "lr = (1 - mu) sqrt(B) eta0": lambda eta0, momentum, batch: (1 - momentum) * batch**0.5 * eta0,
}


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_temperature_fails_with_a_wrong_rule(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Catches: an experiment that does not tell the rule from others.
    monkeypatch.setattr(scaling, "temperature_lr", RULES[rule])
    failed = failing("temperature", replicas=128, batches=[1, 4], eta0=1e-2)
    assert "rule: largest loss over smallest, at most" in failed
    assert "rule: two losses apart, standard errors, at most" in failed
    assert "rule: total effect of a gradient over eta0, off by" in failed
    assert "loss against the Lyapunov equation's, standard errors, at most" not in failed


@pytest.mark.slow
def test_temperature_fails_with_a_wrong_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    # Catches: an experiment that would not see another momentum than torch's.
    sgd = fusedopt.SGD

    def damped(params: Any, lr: float, momentum: float, **common: Any) -> fusedopt.SGD:
        return sgd(params, lr, momentum, dampening=momentum, **common)

    monkeypatch.setattr(fusedopt, "SGD", damped)
    failed = failing("temperature", replicas=128, batches=[1, 4], eta0=1e-2)
    assert "loss against the Lyapunov equation's, standard errors, at most" in failed
    assert "rule: largest loss over smallest, at most" in failed


@pytest.mark.slow
def test_denominator(tmp_path: Path) -> None:
    # Catches: a denominator that is not s + eps or sqrt(s) + eps, or an eps outside it.
    arms = run("denominator", tmp_path)["arms"]
    # A power of 2 is exact in every operation, and so is the root of its square.
    for name in ("std_lr", "variance", "std_loss", "variance_loss_lr"):
        assert arms[name]["M1"]["0.0625"] == [0.0], name
    # The form that is not rescaled is the same in all its arms.
    for form in ("std", "variance"):
        same = [arm["losses"]["1.0"] for name, arm in arms.items() if name.startswith(form)]
        assert same[0] == same[-1]


@pytest.mark.slow
def test_denominator_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    # Catches: an experiment that both forms pass, or to which eps does not matter.
    experiment, rmsprop = module("denominator"), fusedopt.RMSprop

    def always_std(params: Any, denominator: str, **hyper: Any) -> fusedopt.RMSprop:
        return rmsprop(params, denominator="std", **hyper)

    size = {"evaluations": 1, "factors": [3.0], "sweep": [1e-3]}
    eps = {"lr": 1e-6, "eps": 1e-6}
    failed = failing("denominator", **size, negligible=eps)
    assert f"M1 of {experiment.ARMS['variance_eps'].title}, at most" in failed
    assert f"M1 of {experiment.ARMS['variance'].title}, at most" not in failed
    monkeypatch.setattr(fusedopt, "RMSprop", always_std)
    failed = failing("denominator", **size)
    assert f"M1 of {experiment.ARMS['variance'].title}, at most" in failed
    assert f"M1 of {experiment.ARMS['variance_loss_lr'].title}, at most" in failed
    assert f"M1 of {experiment.ARMS['std_lr'].title}, at most" not in failed


@pytest.mark.slow
def test_bias_corrections(tmp_path: Path) -> None:
    # Catches: a moment that is corrected twice, not at all, or with another step count.
    figures = run("bias_corrections", tmp_path)
    synthetic = figures["synthetic"]
    for name, length in {"none": 3.1623, "rmsprop_none": 10.0, "adam": 1.0}.items():
        assert synthetic[name]["step"][0] == pytest.approx(length, rel=1e-3), name
    # Up to t = N the running mean is the plain mean of independent values.
    deviations = synthetic["running_mean"]["first"]["deviation"]
    for step in (1, 4, 10):
        assert deviations[step - 1] == pytest.approx(2.0 / step**0.5, rel=0.03)
    assert figures["theory"]["first"][9] == pytest.approx(0.95789, abs=1e-4)


MISTAKES = {
    # The correction that is asked for, the one that is made, and claims that must fail.
    "Adam's forgotten": ("AdamW", "adam", None, {"the update", "length"}),
    "none made anyway": ("AdamW", None, "adam", {"the update", "length", "digits"}),
    "running mean is Adam's": ("AdamW", "running_mean", "adam", {"the update", "corrected"}),
    "running mean forgotten": ("AdamW", "running_mean", None, {"corrected", "length", "digits"}),
    "RMSprop's forgotten": ("RMSprop", True, False, {"the update", "length"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_bias_corrections_fail(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Catches: an experiment that does not tell the corrections apart.
    name, asked, made, expected = MISTAKES[mistake]
    optimizer = getattr(fusedopt, name)

    def mistaken(params: Any, bias_correction: Any, **hyper: Any) -> Any:
        correction = made if bias_correction == asked else bias_correction
        return optimizer(params, bias_correction=correction, **hyper)

    monkeypatch.setattr(fusedopt, name, mistaken)
    failed = failing("bias_corrections", seeds=[0])
    for begin in expected:
        assert any(text.startswith(begin) for text in failed), (begin, failed)


@pytest.mark.slow
def test_bias_corrections_fail_with_another_horizon(monkeypatch: pytest.MonkeyPatch) -> None:
    # Catches: a running mean over another number of values than 1 / (1 - beta), which is unbiased.
    adamw = fusedopt.AdamW

    def longer(params: Any, bias_correction: Any, betas: Any, **common: Any) -> fusedopt.AdamW:
        betas = (0.95, betas[1]) if bias_correction == "running_mean" else betas
        return adamw(params, betas=betas, bias_correction=bias_correction, **common)

    monkeypatch.setattr(fusedopt, "AdamW", longer)
    assert failing("bias_corrections", seeds=[0]) == ["both moments: off from theory by"]
