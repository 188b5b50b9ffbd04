"""How the distance between two batch sizes falls with the learning rate.

What is compared is the parameters after the same samples: |theta_B - theta_b| over
|theta_b - theta_0|. As lr falls, the decays' gaps 1 - beta fall with it and the training gets
longer by as much, so that every lr follows the same path, in finer steps.

Micro-batches and virtual batch 1 square the same gradients at both batch sizes, and differ in the
order within a batch alone: slope 1. A virtual batch of the base size is, at the larger batch, the
average over all ways to divide it, where the base run has one of them. The second moment averages
that difference over about 1 / (1 - beta2) steps, a number that grows as 1 / lr: slope 1/2, from
where it outweighs the order within a batch. The square-root rule has another limit: slope 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.progress import Progress
from torch import Tensor

from .arms import Arm, train
from .digits_task import Digits

TITLE = "Order: does invariance become exact as the learning rate falls?"
FULL = {
    "seeds": [0, 1, 2],
    "batches": [8, 128],
    "lr": [1e-3, 5e-4, 2.5e-4, 1.25e-4, 6.25e-5],
    # At the first lr; the others follow from it.
    "epochs": 2,
    "betas": (0.98, 0.998),
    "eps": 1e-8,
}
REDUCED = {"seeds": [0], "lr": [1e-3, 5e-4, 2.5e-4], "epochs": 1}
# With the range in which each slope must lie. The square-root rule's betas in the form that is
# defined for every lr.
ARMS = {
    "micro": (Arm("micro-batches of 8", "decoupled", "micro"), (0.8, 1.2)),
    "per_sample": (Arm("virtual batch 1", "decoupled", "sample"), (0.8, 1.2)),
    "virtual": (Arm("virtual batch 8", "decoupled", "sample", virtual_batch_size=8), (0.4, 1.2)),
    "sqrt": (Arm("Adam, square-root rule", "sqrt", beta_form="power"), (-0.2, 0.2)),
}
COLORS = ("#08519c", "#6baed6", "#b30000", "#757575")


def run(settings: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Train at both batch sizes for every lr."""
    bar = progress.add_task("", total=len(ARMS) * len(settings["seeds"]) * len(settings["lr"]))
    found: dict[str, Any] = {}
    for name, (arm, _) in ARMS.items():
        rows: list[list[float]] = []
        for seed in settings["seeds"]:
            rows.append([])
            for lr in settings["lr"]:
                rows[-1].append(_distance(settings, arm, seed, lr))
                progress.advance(bar)
        slopes = [_slope(settings["lr"], row) for row in rows]
        found[name] = {"title": arm.title, "M3": rows, "slopes": slopes}
    return {"arms": found}


def _distance(settings: dict[str, Any], arm: Arm, seed: int, lr: float) -> float:
    finer = settings["lr"][0] / lr
    task = Digits(round(settings["epochs"] * finer), seed, settings["device"])
    hyper = {
        "lr": lr,
        "betas": tuple(1 - (1 - beta) / finer for beta in settings["betas"]),
        "eps": settings["eps"],
        "weight_decay": 0.0,
    }
    small, large = settings["batches"]
    start = [p.detach().clone() for p in task.model().parameters()]
    ends = [
        train(task, arm, arm.hyper(hyper, small, batch), small, batch).parameters
        for batch in (small, large)
    ]
    return _norm(ends[1], ends[0]) / _norm(ends[0], start)


def _norm(a: list[Tensor], b: list[Tensor]) -> float:
    return math.sqrt(sum((x - y).square().sum().item() for x, y in zip(a, b, strict=True)))


def _slope(x: list[float], y: list[float]) -> float:
    """Return the slope of the straight line through the logs, by least squares."""
    u, v = torch.tensor(x).log(), torch.tensor(y).log()
    u = u - u.mean()
    return ((u * v).sum() / (u * u).sum()).item()


def claims(result: dict[str, Any]) -> list[tuple[str, float, float, bool]]:
    """Return what the figures must show, in the worst seed."""
    stated = []
    for name, entry in result["figures"]["arms"].items():
        low, high = ARMS[name][1]
        least, most = min(entry["slopes"]), max(entry["slopes"])
        text = f"slope of log M3 against log lr, {entry['title']}"
        stated.append((f"{text}, at least", least, low, least >= low))
        stated.append((f"{text}, at most", most, high, most <= high))
    return stated


def draw(result: dict[str, Any]) -> Figure:
    """Plot M3 against lr on logarithmic axes, with a line of slope 1."""
    settings, found = result["settings"], result["figures"]["arms"]
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    axes = figure.subplots()
    for (name, entry), color in zip(found.items(), COLORS, strict=True):
        slope = sum(entry["slopes"]) / len(entry["slopes"])
        for i, row in enumerate(entry["M3"]):
            label = f"{entry['title']}: slope {slope:.2f}" if i == 0 else None
            axes.plot(settings["lr"], row, "o-", color=color, ms=4, lw=1.2, label=label)
        if name == "micro":
            line = [entry["M3"][0][0] * 0.5 * lr / settings["lr"][0] for lr in settings["lr"]]
            axes.plot(settings["lr"], line, "k--", lw=1, label="slope 1")
    axes.set(xscale="log", yscale="log", xlabel=f"lr at batch {settings['batches'][0]}")
    axes.set_ylabel("M3, distance of the parameters over their displacement")
    small, large = settings["batches"]
    axes.set_title(f"Digits, batch {large} against batch {small}, a line a seed")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure
