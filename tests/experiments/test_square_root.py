"""The experiments on the square-root rule and on noise at reduced size, and what fails them."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def _checkout() -> Iterator[None]:
    """Make experiments importable, which no installation has."""
    sys.path.insert(0, str(ROOT))
    yield
    sys.path.remove(str(ROOT))


def module(name: str) -> ModuleType:
    return importlib.import_module(f"experiments.{name}")


class Progress:
    def add_task(self, *_: Any, **__: Any) -> int:
        return 0

    def advance(self, *_: Any) -> None:
        pass


class Rows:
    """Samples whose gradients with respect to the weight are given rows."""

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.order, self.interval = rows, torch.arange(len(rows)), len(rows)

    def model(self) -> nn.Module:
        layer = nn.Linear(1, self.rows.shape[1], bias=False, dtype=torch.float64)
        nn.init.zeros_(layer.weight)
        return layer

    def loss(self, model: nn.Module, samples: Tensor) -> Tensor:
        rows = self.rows[samples]
        return (model(rows.new_ones(len(rows), 1)) * rows).sum(1).mean()

    def evaluate(self, model: nn.Module) -> float:
        return 0.0


def rows(count: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 0.3 + torch.randn(count, width, generator=generator, dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["square_root", "noise_signal"])
def test_reduced_run(name: str, tmp_path: Path) -> None:
    # Catches: what test_mistakes_fail_the_claims and test_noise_of_another_batch put in.
    assert module("__main__").main([name, "--reduced", "--out", str(tmp_path)]) == 0
    picture = (tmp_path / f"{name}.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert len(result["claims"]) == {"square_root": 10, "noise_signal": 8}[name]
    for task in ("digits", "gpt"):
        if name == "square_root":
            (seed,) = result["figures"]["tasks"][task]
            losses = seed["losses"]["8"]
            # The prediction is later than the base batch, and not the base batch itself.
            assert all(a > b for a, b in zip(seed["predicted_losses"]["128"], losses, strict=True))
        else:
            (seed,) = result["figures"]["tasks"][task]["sqrt"]["512"]
            assert len(seed["measured"]["noise"]) == len(seed["read"]["noise"]) + 1


def test_drift_of_a_coordinate() -> None:
    # Catches: kappa for its root, 1 / B0 and 1 / (kappa B0) exchanged.
    drift = module("drift")
    assert drift.ratio(1e-9, 8, 64) == pytest.approx(1.0, abs=1e-5)
    assert drift.ratio(1e9, 8, 64) == pytest.approx(1 / 8)
    # The values of the design note.
    for r, value in ((1e-3, 0.82), (1e-2, 0.42), (0.1, 0.19), (10.0, 0.13)):
        assert drift.ratio(r, 8, 64) == pytest.approx(value, abs=0.006)


@pytest.mark.parametrize(
    ("population", "ways", "count"),
    [
        (6, lambda size: itertools.combinations(range(6), size), 4),
        (math.inf, lambda size: itertools.product(range(6), repeat=size), 2),
    ],
)
def test_moments_are_unbiased(population: float, ways: Any, count: int) -> None:
    # Catches: n for n - 1, the population's end left out, the mean square of one sample for a
    # batch's: over all ways to draw, the estimates' mean is the truth, exactly.
    task = Rows(rows(6, 3))
    found = [
        module("moments").measure(task, task.model(), torch.tensor(way), population)
        for way in ways(count)
    ]
    squared_means = torch.stack([m.squared_mean() for m in found])
    torch.testing.assert_close(squared_means.mean(0), task.rows.mean(0).square())
    for batch in (1, 2):
        squares = torch.stack([task.rows[list(way)].mean(0).square() for way in ways(batch)])
        estimates = torch.stack([m.batch_square(batch) for m in found])
        torch.testing.assert_close(estimates.mean(0), squares.mean(0))


def test_drift_of_a_network_is_that_of_its_coordinates() -> None:
    # Catches: another weight than a coordinate's part in the descent, coordinates that no sample
    # reaches counted.
    drift, moments = module("drift"), module("moments")
    mean = torch.tensor([0.1, 2.0, 0.0], dtype=torch.float64)
    variance = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    # The estimates' corrections vanish with so many samples.
    found = drift.of_descent(moments.Moments(mean, variance, 10**12), 8, 512)
    weights = [m * m / math.sqrt(m * m + 1 / 8) for m in (0.1, 2.0)]
    parts = [drift.ratio(m * m, 8, 64) for m in (0.1, 2.0)]
    expected = sum(w * d for w, d in zip(weights, parts, strict=True)) / sum(weights)
    assert found == pytest.approx(expected, rel=1e-6)


def test_slowed_passes_the_same_losses_later() -> None:
    # Catches: the pace for its inverse, places of the slow training for those of the base's.
    drift = module("drift")
    losses = [math.exp(-0.1 * n) for n in range(21)]
    slow = drift.slowed(losses, [0.5] * 21)
    assert slow == pytest.approx([math.exp(-0.05 * n) for n in range(1, 21)])
    # A place is reached after the sum of 1 / D up to it: 10 of 1, then 5 of 2.
    slow = drift.slowed(losses, [1.0] * 10 + [0.5] * 11)
    assert slow[-1] == pytest.approx(math.exp(-0.1 * 15), rel=0.03)


def test_frozen_parameters() -> None:
    # Catches: a model that moves along, the burn-in counted, a movement per step.
    drift, samples = module("drift"), rows(1, 4).expand(64, 4)
    task = Rows(samples)
    model = task.model()
    hyper = {"lr": 0.5, "betas": (0.9, 0.99), "eps": 0.0, "weight_decay": 0.0}
    moved = drift.frozen_displacement(task, model, hyper, task.order, 4, 16)
    torch.testing.assert_close(moved, -0.5 / 4 * samples[0].sign())
    assert model.weight.eq(0).all()


def test_scalar_drift_without_noise() -> None:
    # Catches: lr not rescaled, steps taken for samples.
    drift = module("drift")
    settings = {"r": [1e8], "base_batch": 8, "replicates": 4, "steps": 20, "burn_in": 5, "seed": 0}
    base, large = (drift.scalar(settings, (0.9, 0.99), kappa) for kappa in (1, 16))
    assert (large.mean() / base.mean()).item() == pytest.approx(1 / 4, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistake", "fails"),
    [
        ("none", set()),
        # The linear rule in place of the square-root rule.
        ("rule", {"frozen", "drift", "curve"}),
        # The premise of the rule, that noise dominates, for a prediction.
        ("premise", {"frozen", "curve"}),
        # The variance of a sample for that of a batch.
        ("variance", {"frozen", "curve"}),
        # Second moments that do not depend on the batch, with their rule: no lag.
        ("decoupled", {"frozen", "drift", "curve"}),
    ],
)
def test_mistakes_fail_the_claims(
    mistake: str, fails: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    square_root, arm = module("square_root"), module("arms").Arm
    if mistake == "rule":
        monkeypatch.setattr(square_root, "ARM", arm("", "linear"))
    elif mistake == "premise":
        monkeypatch.setattr(module("drift"), "of_descent", lambda *_: 1.0)
    elif mistake == "variance":
        square = lambda m, _: m.mean.square() + m.variance  # noqa: E731
        monkeypatch.setattr(module("moments").Moments, "batch_square", square)
    elif mistake == "decoupled":
        virtual = arm("", "decoupled", "sample", virtual_batch_size=8)
        monkeypatch.setattr(square_root, "ARM", virtual)
    settings = square_root.REDUCED["digits"]
    task = square_root.task_of("digits", settings, 0, "cpu")
    seed = square_root._seed(settings, task, 1024, Progress(), 0)
    holds = [claim[-1] for claim in square_root._task_claims("digits", settings, [seed])]
    names = ("frozen", "drift", "growth", "curve")
    found = {name for name, value in zip(names, holds, strict=True) if not value}
    assert found == fails, (mistake, seed)


@pytest.mark.parametrize("arm", ["sqrt", "virtual"])
def test_noise_is_that_of_the_last_batch(arm: str) -> None:
    # Catches: samples of several steps read as one batch, as where plain AdamW, which does not
    # know the statistics, is left to clear them; noise of the batch's mean for that of a sample.
    task = Rows(rows(8, 3))
    settings = {
        "batches": [4],
        "hyper": {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0},
        "memory": 1e-3,
        "measured_samples": 8,
        "measured_every": 1,
    }
    found = module("noise_signal")._train(task, settings, arm, 4, lambda: None)
    assert found["read"]["noise"] == [pytest.approx(task.rows[4:].var(0).sum().item())]
    assert found["measured"]["noise"] == [pytest.approx(task.rows.var(0).sum().item())] * 2
    signal = task.rows.mean(0).square().sum() - task.rows.var(0).sum() / 8
    assert found["measured"]["signal"] == [pytest.approx(signal.item())] * 2


def test_noise_over_signal() -> None:
    # Catches: the ratio of squares for that of norms, a negative estimate in a root.
    ratio = module("noise_signal").noise_over_signal
    found = ratio({"noise": [32.0, 1.0], "signal": [1.0, -0.1]}, 8)
    assert found[0] == pytest.approx(2.0) and math.isnan(found[1])
