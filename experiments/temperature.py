"""Momentum, batch size and the temperature of SGD on a noisy quadratic.

The temperature rule lr = (1 - mu) B eta0 (McAllester, TTIC 31230, "SGD with momentum") is to keep
the loss at which SGD settles, whatever the momentum mu and the batch size B. Here the loss is
1/2 sum h_i x_i^2 and a sample's gradient is h x + normal noise of covariance Sigma, so that it can
be checked without a fit: to first order in lr, that loss is eta0 tr(Sigma) / 4 for every h, and
for a finite lr it follows from the discrete Lyapunov equation of the process. The replicas are rows
of one parameter. A batch is drawn as the mean of its samples' noise, which is normal with
covariance Sigma / B.

The rule is derived from the total effect of a sample's gradient g on the parameters, over all later
steps: lr / (1 - mu) * g / B = eta0 g. That sum is measured on the optimizer, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.progress import Progress
from torch import Tensor

import fusedopt
from fusedopt import scaling

from .arms import backend

TITLE = "Temperature: does lr = (1 - mu) B eta0 keep the stationary loss?"
FULL = {
    "eta0": 2e-4,  # parameter per gradient
    "momenta": [0.0, 0.5, 0.9, 0.99],
    "batches": [1, 4, 16, 64],
    "curvatures": [0.5, 0.65, 0.8, 1.0],
    "variances": [1.0, 0.1, 3.0, 0.5],  # of a sample's gradient, in each direction
    "replicas": 4096,
    # In relaxation times of the slowest direction: e^-5 of the way to the stationary loss is left.
    "burn_in": 5,
    "window": 4,
    "snapshots": 16,
    "seed": 0,
}
REDUCED = {"eta0": 2e-3, "momenta": [0.0, 0.9], "batches": [1, 16], "replicas": 512}
# From batch 1 on: light to dark.
COLORS = ("#fdbb84", "#ef6548", "#b30000", "#4a0000")


def run(settings: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Measure the stationary loss of every momentum and batch size, with the rule and without."""
    eta0 = settings["eta0"]
    cells = [
        {"rule": rule, "momentum": mu, "batch": batch, "lr": _lr(settings, rule, mu, batch)}
        for rule in (True, False)
        for batch in settings["batches"]
        for mu in settings["momenta"]
    ]
    relaxations = settings["burn_in"] + settings["window"]
    total = sum(math.ceil(relaxations * _relaxation(settings, cell)) for cell in cells)
    bar = progress.add_task("", total=total)
    generator = torch.Generator(settings["device"]).manual_seed(settings["seed"])
    for cell in cells:
        losses = _losses(settings, cell, generator, lambda n: progress.advance(bar, n))
        root = math.sqrt(len(losses))
        cell |= {"loss": losses.mean().item(), "standard_error": losses.std().item() / root}
        cell["exact"] = _exact(settings, cell)
    effects = [_total_effect(eta0, cell) for cell in cells if cell["rule"]]
    return {"first_order": eta0 * sum(settings["variances"]) / 4, "cells": cells, "total": effects}


def _lr(settings: dict[str, Any], rule: bool, momentum: float, batch: int) -> float:
    """Return the rule's lr; without it, the one of the largest batch without momentum."""
    if rule:
        return scaling.temperature_lr(settings["eta0"], momentum, batch)
    return scaling.temperature_lr(settings["eta0"], 0.0, max(settings["batches"]))


def _transition(cell: dict[str, Any], curvature: float) -> Tensor:
    """Return what a step without noise does to (parameter, momentum buffer)."""
    lr, mu = cell["lr"], cell["momentum"]
    rows = [[1 - lr * curvature, -lr * mu], [curvature, mu]]
    return torch.tensor(rows, dtype=torch.float64)


def _relaxation(settings: dict[str, Any], cell: dict[str, Any]) -> float:
    """Return the steps in which the slowest direction's variance comes nearer by a factor e."""
    radii = [
        torch.linalg.eigvals(_transition(cell, curvature)).abs().max().item()
        for curvature in settings["curvatures"]
    ]
    return -1 / (2 * math.log(max(radii)))


def _exact(settings: dict[str, Any], cell: dict[str, Any]) -> float:
    """Return the stationary loss: P = A P A^T + c c^T in each direction."""
    loss = 0.0
    for curvature, variance in zip(settings["curvatures"], settings["variances"], strict=True):
        step = _transition(cell, curvature)
        kick = torch.tensor([-cell["lr"], 1.0], dtype=torch.float64)
        noise = torch.outer(kick, kick) * variance / cell["batch"]
        system = torch.eye(4, dtype=torch.float64) - torch.kron(step, step)
        loss += curvature * torch.linalg.solve(system, noise.flatten())[0].item() / 2
    return loss


def _losses(
    settings: dict[str, Any],
    cell: dict[str, Any],
    generator: torch.Generator,
    advance: Callable[[int], object],
) -> Tensor:
    """Return each replica's loss, averaged over snapshots after the burn-in; all start at 0."""
    like = {"device": settings["device"], "dtype": torch.float32}
    curvatures = torch.tensor(settings["curvatures"], **like)
    deviations = torch.tensor(settings["variances"], **like).div(cell["batch"]).sqrt()
    x = torch.nn.Parameter(torch.zeros(settings["replicas"], len(curvatures), **like))
    x.grad = torch.zeros_like(x)
    optimizer = fusedopt.SGD(
        [x], lr=cell["lr"], momentum=cell["momentum"], backend=backend(x.device)
    )

    @torch.no_grad()
    def steps(count: int) -> None:
        for _ in range(count):
            x.grad.normal_(generator=generator).mul_(deviations).addcmul_(x, curvatures)
            optimizer.step()
        advance(count)

    relaxation, snapshots = _relaxation(settings, cell), settings["snapshots"]
    steps(math.ceil(settings["burn_in"] * relaxation))
    total = torch.zeros(len(x), device=x.device, dtype=torch.float64)
    for _ in range(snapshots):
        steps(math.ceil(settings["window"] * relaxation / snapshots))
        total += (curvatures * x.detach().square()).sum(1) / 2
    return total / snapshots


def _total_effect(eta0: float, cell: dict[str, Any]) -> dict[str, Any]:
    """Give one sample of one batch the gradient 1, and nothing after; return the displacement."""
    x = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = fusedopt.SGD(
        [x], lr=cell["lr"], momentum=cell["momentum"], backend=backend(x.device)
    )
    x.grad = torch.ones_like(x) / cell["batch"]
    # Until 1e-12 of it is left.
    count = math.ceil(math.log(1e-12) / math.log(cell["momentum"])) if cell["momentum"] else 1
    path = {}
    for step in range(1, count + 1):
        optimizer.step()
        x.grad.zero_()
        if step & (step - 1) == 0 or step == count:
            path[step] = -x.item() / eta0
    return {"momentum": cell["momentum"], "batch": cell["batch"], "over_eta0": path}


def claims(result: dict[str, Any]) -> list[tuple[str, float, float, bool]]:
    """Return what the figures must show."""
    settings, figures = result["settings"], result["figures"]
    cells = figures["cells"]
    off = max(abs(cell["loss"] - cell["exact"]) / cell["standard_error"] for cell in cells)
    ruled = [cell for cell in cells if cell["rule"]]
    apart = max(_apart(*pair) for pair in combinations(ruled, 2))
    spread, without = _ratio(ruled), _ratio([cell for cell in cells if not cell["rule"]])
    batches, momenta = settings["batches"], settings["momenta"]
    ratio = max(batches) / min(batches) * (1 - min(momenta)) / (1 - max(momenta))
    error = max(abs([*entry["over_eta0"].values()][-1] - 1) for entry in figures["total"])
    return [
        ("loss against the Lyapunov equation's, standard errors, at most", off, 4.0, off <= 4.0),
        ("rule: two losses apart, standard errors, at most", apart, 4.5, apart <= 4.5),
        ("rule: largest loss over smallest, at most", spread, 1.1, spread <= 1.1),
        ("one lr: largest loss over smallest, at least", without, ratio / 2, without >= ratio / 2),
        ("rule: total effect of a gradient over eta0, off by", error, 1e-9, error <= 1e-9),
    ]


def _apart(a: dict[str, Any], b: dict[str, Any]) -> float:
    return abs(a["loss"] - b["loss"]) / math.hypot(a["standard_error"], b["standard_error"])


def _ratio(cells: list[dict[str, Any]]) -> float:
    losses = [cell["loss"] for cell in cells]
    return max(losses) / min(losses)


def draw(result: dict[str, Any]) -> Figure:
    """Plot the stationary losses, how far the rule's are off, and the total effects."""
    settings, figures = result["settings"], result["figures"]
    figure = Figure(figsize=(12, 8.5), layout="constrained")
    figure.suptitle(
        f"SGD on a noisy quadratic, {settings['replicas']:,} replicas, eta0 = {settings['eta0']:g}"
    )
    (without, ruled), (zoom, total) = figure.subplots(2, 2)
    ruled.sharey(without)
    for axes, rule in ((without, False), (ruled, True)):
        _draw_losses(axes, result, rule)
    without.set_title(f"one lr for all, {figures['cells'][-1]['lr']:g}: a loss for each mu and B")
    ruled.set_title("lr = (1 - mu) B eta0: one loss for all")
    without.legend(title="batch size B", fontsize="small")
    _draw_zoom(zoom, result)
    _draw_total(total, result)
    return figure


def _of_batch(result: dict[str, Any], rule: bool, batch: int) -> list[dict[str, Any]]:
    cells = result["figures"]["cells"]
    return [cell for cell in cells if cell["rule"] is rule and cell["batch"] == batch]


def _places(settings: dict[str, Any], batch: int) -> list[float]:
    """Return where a batch size's points lie: side by side, as they coincide."""
    batches = settings["batches"]
    offset = 0.16 * (batches.index(batch) - (len(batches) - 1) / 2)
    return [place + offset for place in range(len(settings["momenta"]))]


def _momentum_axis(axes: Axes, settings: dict[str, Any]) -> None:
    axes.set_xticks(range(len(settings["momenta"])), [f"{mu:g}" for mu in settings["momenta"]])
    axes.set_xlabel("momentum mu")
    axes.grid(alpha=0.3, which="major")


def _draw_losses(axes: Axes, result: dict[str, Any], rule: bool) -> None:
    settings = result["settings"]
    for batch, color in zip(settings["batches"], COLORS, strict=False):
        cells = _of_batch(result, rule, batch)
        losses, errors = ([cell[key] for cell in cells] for key in ("loss", "standard_error"))
        places = _places(settings, batch)
        axes.errorbar(places, losses, errors, fmt="o", color=color, ms=6, label=batch)
        axes.plot(places, [_first_order(settings, cell) for cell in cells], color=color, lw=1.2)
    axes.plot([], [], color="black", lw=1.2, label="lr tr(Σ) / (4 B (1 - mu))")
    axes.set_yscale("log")
    axes.set_ylabel("stationary loss")
    _momentum_axis(axes, settings)


def _first_order(settings: dict[str, Any], cell: dict[str, Any]) -> float:
    value: float = cell["lr"] * sum(settings["variances"]) / 4
    return value / cell["batch"] / (1 - cell["momentum"])


def _draw_zoom(axes: Axes, result: dict[str, Any]) -> None:
    settings, first_order = result["settings"], result["figures"]["first_order"]
    for batch, color in zip(settings["batches"], COLORS, strict=False):
        cells, places = _of_batch(result, True, batch), _places(settings, batch)
        percent = [100 * (cell["loss"] / first_order - 1) for cell in cells]
        errors = [100 * cell["standard_error"] / first_order for cell in cells]
        axes.errorbar(places, percent, errors, fmt="o", color=color, ms=5, capsize=3, label=batch)
        exact = [100 * (cell["exact"] / first_order - 1) for cell in cells]
        axes.plot(places, exact, "_", color="black", ms=14, mew=1.5)
    axes.axhline(0, color="black", lw=1, ls="--", label="eta0 tr(Σ) / 4")
    axes.plot([], [], "_", color="black", ms=14, mew=1.5, label="exact, Lyapunov")
    axes.set_ylabel("stationary loss over eta0 tr(Σ) / 4, minus 1, %")
    axes.set_title("the rule's losses, magnified (bars: one standard error)")
    axes.legend(fontsize="small", ncols=3)
    axes.margins(y=0.25)
    _momentum_axis(axes, settings)


def _draw_total(axes: Axes, result: dict[str, Any]) -> None:
    settings = result["settings"]
    smallest = settings["batches"][0]
    paths = [e for e in result["figures"]["total"] if e["batch"] == smallest]
    for entry, color in zip(paths, ("#08306b", "#2171b5", "#6baed6", "#9ecae1"), strict=False):
        mu, path = entry["momentum"], entry["over_eta0"]
        line = [2 ** (i / 8) for i in range(89)]
        axes.plot(line, [1 - mu**step for step in line], color=color, lw=1.2)
        axes.plot(list(path), list(path.values()), "o", color=color, ms=5, label=f"{mu:g}")
    axes.set(xscale="log", xlim=(0.9, 2**11), ylim=(0, 1.08))
    axes.set_xlabel("steps since the gradient")
    axes.set_ylabel("displacement over eta0 g")
    axes.set_title(f"effect of one sample's gradient g, B = {smallest} (lines: 1 - mu^t)")
    axes.grid(alpha=0.3)
    axes.legend(title="momentum mu", fontsize="small")
