"""Where the square-root rule for Adam fails, and that its failure can be computed beforehand.

Three measurements against one formula, D of ``drift``, which has no free parameter:

- Scalar Gaussian gradients: the movement per sample of AdamW, for many r = mu^2 / sigma^2.
- Frozen parameters, taken from the base batch's training: AdamW at each batch size, stepping
  through the gradients at one point, so that second moments settle. Measured is the descent per
  sample, -mu . movement, over that at the base batch; predicted is D averaged over coordinates,
  each weighted by its part in that descent. r comes from per-sample squares.
- Trainings, of the same samples in the same order. Predicted is the base batch's loss curve, passed
  through more slowly by that average of D at each of its points.

The prediction takes every batch size to go the same way, with second moments that have settled. It
is good to first order in lr; at the start, when moments have not settled, large batches lag less
than it says. The loss of the digits is that of all training images, and images are drawn without
replacement: sigma^2 / B is sigma^2 (1 / B - 1 / 1024) for them. The GPT sees each window once, and
its loss is that of held-out windows. Decays follow beta ** kappa: 1 - kappa (1 - beta) ends at
kappa = 100 for beta = 0.99, and at 64 is 0.36 instead of 0.53.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.progress import Progress
from torch import Tensor, nn

from . import char_gpt, drift, square_root_figure
from .arms import Arm, Task, distance, train
from .digits_task import IMAGES, Digits
from .moments import measure, model_at

TITLE = "Square-root rule: does Adam lag behind at large batches as predicted?"
FULL: dict[str, Any] = {
    "scalar": {
        "r": [10 ** (i / 2) for i in range(-6, 3)],
        "kappas": [1, 4, 16, 64],
        "base_batch": 8,
        # So slow that second moments hardly vary, and those of the trainings.
        "betas": {"slow": (0.999, 0.99999), "trainings": (0.99, 0.999)},
        "replicates": 1024,
        "steps": 4000,
        "burn_in": 1000,
        "seed": 0,
        "bounds": {"slow": 0.03, "trainings": 0.05},
    },
    "digits": {
        "seeds": [0, 1, 2],
        "batches": [8, 32, 128, 512],
        "evaluations": 40,  # epochs
        "hyper": {"lr": 1e-4, "betas": (0.99, 0.999), "eps": 1e-8, "weight_decay": 0.0},
        # Evaluations after which moments are measured, and parameters are frozen.
        "path": list(range(41)),
        "frozen": [0, 20, 40],
        "moment_samples": IMAGES,
        # Samples, at frozen parameters.
        "burn_in": 8192,
        "drawn": 24576,
        "bounds": {"frozen": 0.05, "curve": 0.05, "drift": 0.7},
    },
    "gpt": {
        "seeds": [0, 1, 2],
        "batches": [8, 32, 128, 512],
        "windows": 16384,
        "evaluations": 32,
        "held_out_windows": 256,
        "model": {"context": 32, "width": 32, "heads": 4, "layers": 2},
        "hyper": {"lr": 3e-4, "betas": (0.99, 0.999), "eps": 1e-8, "weight_decay": 0.0},
        "path": [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32],
        "frozen": [0, 4, 32],
        "moment_samples": 4096,
        "burn_in": 4096,
        "drawn": 8192,
        "bounds": {"frozen": 0.12, "curve": 0.3, "drift": 0.7},
    },
}
REDUCED: dict[str, Any] = {
    "scalar": {
        **FULL["scalar"],
        "r": [0.01, 0.1, 10.0],
        "replicates": 512,
        "steps": 600,
        "burn_in": 400,
    },
    "digits": {
        **FULL["digits"],
        "seeds": [0],
        "batches": [8, 32, 128],
        "evaluations": 6,
        "path": list(range(7)),
        "frozen": [6],
        "burn_in": 2048,
        "drawn": 6144,
        "bounds": {"frozen": 0.05, "curve": 0.1, "drift": 0.7},
    },
    "gpt": {
        **FULL["gpt"],
        "seeds": [0],
        "batches": [8, 32, 128],
        "windows": 2048,
        "evaluations": 8,
        "held_out_windows": 64,
        "model": {"context": 16, "width": 16, "heads": 2, "layers": 1},
        "path": [0, 1, 2, 4, 8],
        "frozen": [8],
        "moment_samples": 1024,
        "burn_in": 1024,
        "drawn": 2048,
        "bounds": {"frozen": 0.2, "curve": 0.5, "drift": 0.7},
    },
}
TITLES = {"digits": "digits", "gpt": "character GPT"}
ARM = Arm("Adam, square-root rule", "sqrt", beta_form="power")


class Watched:
    """A task that keeps the parameters of each evaluation."""

    def __init__(self, task: Task) -> None:
        self.order, self.interval = task.order, task.interval
        self.model, self.loss = task.model, task.loss
        self._evaluate = task.evaluate
        self.seen: list[list[Tensor]] = []

    def evaluate(self, model: nn.Module) -> float:
        """Return the task's own loss."""
        self.seen.append([p.detach().clone() for p in model.parameters()])
        return self._evaluate(model)


def task_of(name: str, settings: dict[str, Any], seed: int, device: str) -> Task:
    """Return a task by its name in the settings."""
    if name == "digits":
        return Digits(settings["evaluations"], seed, device)
    return char_gpt.Windows({**settings, "device": device}, seed)


def run(settings: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Measure scalars, frozen parameters and trainings."""
    bar = progress.add_task("", total=_count(settings))
    found: dict[str, Any] = {"scalar": _scalar(settings["scalar"], progress, bar), "tasks": {}}
    for name in TITLES:
        rows = []
        for seed in settings[name]["seeds"]:
            task = task_of(name, settings[name], seed, settings["device"])
            population = IMAGES if name == "digits" else math.inf
            rows.append(_seed(settings[name], task, population, progress, bar))
        found["tasks"][name] = rows
    return found


def _count(settings: dict[str, Any]) -> int:
    scalar = len(settings["scalar"]["betas"]) * len(settings["scalar"]["kappas"])
    tasks = [settings[name] for name in TITLES]
    each = [len(s["batches"]) * (1 + len(s["frozen"])) + len(s["path"]) for s in tasks]
    return scalar + sum(len(s["seeds"]) * n for s, n in zip(tasks, each, strict=True))


def _scalar(settings: dict[str, Any], progress: Progress, bar: Any) -> dict[str, Any]:
    """Return for each betas and kappa > 1 the drift of every r, over that at kappa = 1."""
    found: dict[str, Any] = {}
    for name, betas in settings["betas"].items():
        speeds = {}
        for kappa in settings["kappas"]:
            speeds[kappa] = drift.scalar(settings, betas, kappa)
            progress.advance(bar)
        base = speeds.pop(1)
        root = math.sqrt(settings["replicates"])
        found[name] = {}
        for kappa, speed in speeds.items():
            relative = [x.std(1) / x.mean(1) / root for x in (speed, base)]
            found[name][kappa] = {
                "drift": (speed.mean(1) / base.mean(1)).tolist(),
                "relative_standard_error": torch.hypot(*relative).tolist(),
                "predicted": [drift.ratio(r, settings["base_batch"], kappa) for r in settings["r"]],
            }
    return found


def _seed(
    settings: dict[str, Any], task: Task, population: float, progress: Progress, bar: Any
) -> dict[str, Any]:
    base, *larger = settings["batches"]
    watched = Watched(task)
    losses = {}
    for batch in settings["batches"]:
        hyper = ARM.hyper(settings["hyper"], base, batch)
        # The base's parameters come first.
        losses[batch] = train(watched, ARM, hyper, base, batch).losses
        progress.advance(bar)
    points = [list(task.model().parameters()), *watched.seen[: settings["evaluations"]]]
    drifts: dict[int, list[float]] = {batch: [] for batch in larger}
    frozen = {}
    for place in settings["path"]:
        model = model_at(task, points[place])
        moments = measure(task, model, task.order[-settings["moment_samples"] :], population)
        for batch in larger:
            drifts[batch].append(drift.of_descent(moments, base, batch))
        progress.advance(bar)
        if place in settings["frozen"]:
            frozen[place] = _frozen(settings, task, points[place], moments.mean, progress, bar)
    start = task.evaluate(task.model())
    found: dict[str, Any] = {"losses": losses, "drift": drifts, "frozen": frozen}
    found["predicted_losses"] = {
        batch: drift.slowed([start, *losses[base]], _along(settings, drifts[batch]))
        for batch in larger
    }
    for name, of, against in (
        ("M1", losses, lambda _: losses[base]),
        ("predicted_M1", found["predicted_losses"], lambda _: losses[base]),
        ("curve", found["predicted_losses"], losses.get),
    ):
        found[name] = {batch: distance(of[batch], against(batch)) for batch in larger}
    return found


def _along(settings: dict[str, Any], drifts: list[float]) -> list[float]:
    """Return the drifts at every evaluation, between those of the path on straight lines."""
    return np.interp(range(settings["evaluations"] + 1), settings["path"], drifts).tolist()


def _frozen(
    settings: dict[str, Any],
    task: Task,
    parameters: list[Tensor],
    mean: Tensor,
    progress: Progress,
    bar: Any,
) -> dict[int, float]:
    """Return the descent per sample over that at the base batch, for each larger batch."""
    base = settings["batches"][0]
    samples = task.order[: settings["drawn"]]
    descents = {}
    for batch in settings["batches"]:
        hyper = ARM.hyper(settings["hyper"], base, batch)
        model = model_at(task, parameters)
        moved = drift.frozen_displacement(task, model, hyper, samples, batch, settings["burn_in"])
        descents[batch] = -(mean @ moved).item()
        progress.advance(bar)
    return {batch: value / descents[base] for batch, value in descents.items() if batch != base}


def claims(result: dict[str, Any]) -> list[tuple[str, float, float, bool]]:
    """Return what the figures must show, at every r, point, batch size and seed."""
    settings, figures = result["settings"], result["figures"]
    stated = []
    for name, rows in figures["scalar"].items():
        off = max(
            abs(measured / predicted - 1)
            for row in rows.values()
            for measured, predicted in zip(row["drift"], row["predicted"], strict=True)
        )
        text = f"scalar, betas {settings['scalar']['betas'][name]}: |drift / D - 1|"
        stated.append(_at_most(text, off, settings["scalar"]["bounds"][name]))
    for name, title in TITLES.items():
        stated += _task_claims(title, settings[name], figures["tasks"][name])
    return stated


def _task_claims(
    title: str, settings: dict[str, Any], seeds: list[dict[str, Any]]
) -> list[tuple[str, float, float, bool]]:
    bounds, (_, *larger) = settings["bounds"], settings["batches"]
    last = larger[-1]
    pairs = [
        (value, seed["drift"][batch][settings["path"].index(place)])
        for seed in seeds
        for place, row in seed["frozen"].items()
        for batch, value in row.items()
    ]
    off = max(abs(a / b - 1) for a, b in pairs)
    drifts = max(row[last] for seed in seeds for row in seed["frozen"].values())
    growth = min(
        seed["M1"][b] / seed["M1"][a]
        for seed in seeds
        for a, b in zip(larger, larger[1:], strict=False)
    )
    left = max(seed["curve"][last] / seed["M1"][last] for seed in seeds)
    text = f"{title}: RMS log of predicted over measured loss at batch {last}, over M1"
    return [
        _at_most(f"{title}, frozen: |drift / prediction - 1|", off, bounds["frozen"]),
        _at_most(f"{title}, frozen: drift at batch {last}", drifts, bounds["drift"]),
        (f"{title}: growth of M1 from batch to batch, above", growth, 1.2, growth > 1.2),
        _at_most(text, left, bounds["curve"]),
    ]


def _at_most(text: str, value: float, bound: float) -> tuple[str, float, float, bool]:
    return f"{text}, at most", value, bound, value <= bound


def draw(result: dict[str, Any]) -> Figure:
    """Plot losses and M1 above, drift below, with the predictions."""
    return square_root_figure.draw(result, TITLES)
