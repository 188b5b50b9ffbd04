"""Weak errors on the noisy quadratic: how far the means are from those of the SDE, and its order.

Replicas come in chunks with noise of their own; errors of a statistic are the jackknife's over
chunks. The SDE's means are those of Euler-Maruyama at two step lengths, extrapolated to zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .noisy_quadratic import (
    FUNCTIONS,
    Amplified,
    Quadratic,
    Refined,
    Setting,
    Solution,
    simulate,
    steps_per_step,
)

# Of a run: means [chunk, time, function].
Means = dict[str, Tensor]
SDE = "SDE"
# The same with twice its steps: what is left of the solver's error after extrapolation is a third.
CONTROL = "SDE, coarser"
_COARSER = (1, 2, 4)


def setting_of(settings: Mapping[str, Any], kind: str, start: float) -> Setting:
    """Return an optimizer with its problem, as the experiment's settings have it."""
    chosen = settings["optimizers"][kind]
    problem = Quadratic(settings["curvatures"], chosen["sigma"])
    start_u = chosen.get("start_u", 1.0)
    return Setting(kind, chosen["hyper"], problem, start, start_u, settings["warm_steps"])


def measure(
    settings: Mapping[str, Any],
    setting: Setting,
    refinements: Iterable[int],
    ells: Iterable[int],
    chunks: int,
    advance: Callable[[], object] = lambda: None,
) -> Means:
    """Return the means of the test functions in every chunk: those of the SDE, its control, the
    refinements ``"1"``, ``"2"`` and so on, and ``"SVAG 2"`` and so on.
    """
    found = []
    for chunk in range(chunks):
        zeros = torch.zeros(
            settings["replicas"],
            len(settings["curvatures"]),
            dtype=torch.float64,
            device=settings["device"],
        )
        runs = _runs(setting, zeros, settings["finest"], refinements, ells)
        rows = []
        values = simulate(setting, runs, zeros, settings["steps"], settings["seed"] + chunk)
        for count, functions in enumerate(values):
            if count % settings["every"] == 0:
                rows.append(_extrapolated({n: f.mean(1).cpu() for n, f in functions.items()}))
        found.append({name: torch.stack([row[name] for row in rows]) for name in rows[0]})
        advance()
    return {name: torch.stack([means[name] for means in found]) for name in found[0]}


def _runs(
    setting: Setting,
    zeros: Tensor,
    finest: int,
    refinements: Iterable[int],
    ells: Iterable[int],
) -> dict[str, Solution | Refined]:
    runs: dict[str, Solution | Refined] = {}
    for i in _COARSER:
        runs[f"{SDE} / {i}"] = Solution(setting, zeros, finest // i)
    for parts in refinements:
        runs[str(parts)] = Refined(setting, zeros, parts)
    for ell in ells:
        runs[f"SVAG {ell}"] = Amplified(setting, zeros, ell)
    return runs


def _extrapolated(means: Means) -> Means:
    fine, middle, coarse = (means.pop(f"{SDE} / {i}") for i in _COARSER)
    return {SDE: 2 * fine - middle, CONTROL: 2 * middle - coarse, **means}


def weak_error(difference: Tensor) -> Tensor:
    """Return the RMS over time of the mean over chunks [chunk, time], less what chance adds."""
    mean, chance = difference.mean(0), difference.var(0) / len(difference)
    return (mean.square() - chance).mean().clamp(min=0.0).sqrt()


def jackknife(statistic: Callable[[Tensor], Tensor], chunks: Tensor) -> tuple[float, float]:
    """Return a statistic of all chunks, and its standard error from leaving out one at a time."""
    count = len(chunks)
    keep = ~torch.eye(count, dtype=torch.bool)
    parts = torch.stack([statistic(chunks[row]) for row in keep])
    error = math.sqrt((count - 1) / count * (parts - parts.mean()).square().sum().item())
    return statistic(chunks).item(), error


def slope(x: Tensor, y: Tensor) -> Tensor:
    """Return the slope of the straight line through the logs, by least squares."""
    u = x.log() - x.log().mean()
    # An error of 0 is no proof of any order.
    return (u * y.clamp(min=1e-12).log()).sum() / u.square().sum()


def summary(setting: Setting, means: Means, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that is told of an optimizer: curves, weak errors, slopes, the solver's error."""
    step = setting.constants.step
    times = torch.arange(means[SDE].shape[1]) * settings["every"] * step
    parts = {name: _parts(setting.kind, name) for name in means if name not in (SDE, CONTROL)}
    functions = FUNCTIONS[: means[SDE].shape[2]]
    return {
        "time": times.tolist(),
        "step": {name: step / count for name, count in parts.items()},
        "constants": vars(setting.constants),
        "curves": {
            function: {name: _curve(means, name, i) for name in [SDE, *parts]}
            for i, function in enumerate(functions)
        },
        "weak_error": {
            function: {name: _error(means, name, i) for name in parts}
            for i, function in enumerate(functions)
        },
        "slope": {
            function: _slope(means, [name for name in parts if name.isdigit()], i)
            for i, function in enumerate(functions)
        },
        "solver_error": {
            function: _gaps(means, CONTROL, i).mean(0).square().mean().sqrt().item() / 3
            for i, function in enumerate(functions)
        },
    }


def _parts(kind: str, name: str) -> int:
    return int(name) if name.isdigit() else steps_per_step(kind, int(name.split()[1]))


def _curve(means: Means, name: str, i: int) -> dict[str, list[float]]:
    """Return the mean over time; its difference from the SDE's, and that one's standard error."""
    chunks = means[name][:, :, i]
    gaps = chunks - means[SDE][:, :, i]
    errors = gaps.std(0) / math.sqrt(len(gaps))
    return {
        "mean": chunks.mean(0).tolist(),
        "difference": gaps.mean(0).tolist(),
        "standard_error": errors.tolist(),
    }


def _gaps(means: Means, name: str, i: int) -> Tensor:
    # All start alike.
    return (means[name] - means[SDE])[:, 1:, i]


def _error(means: Means, name: str, i: int) -> tuple[float, float]:
    return jackknife(weak_error, _gaps(means, name, i))


def _slope(means: Means, names: list[str], i: int) -> tuple[float, float]:
    steps = torch.tensor([1 / float(name) for name in names])
    gaps = torch.stack([_gaps(means, name, i) for name in names], 1)

    def fitted(chunks: Tensor) -> Tensor:
        return slope(steps, torch.stack([weak_error(chunks[:, j]) for j in range(len(names))]))

    return jackknife(fitted, gaps)
