"""Noise against signal over training, for small and large batches under the square-root rule.

The rule is derived for gradients that noise dominates. As figures 4 and 5 of Malladi et al. (arXiv
2205.10287): the norm of the mean gradient, |mu|, against that of the noise of a batch's gradient,
sqrt(tr Sigma / B), while Adam trains at each batch size. Both are read from
``statistics.noise_scale(decay)`` of the batches trained on, by plain AdamW, which knows nothing of
the statistics: a gradient that ``zero_grad`` has set to None begins a new batch. For comparison,
both are measured from many samples at once.

There, noise dominates small batches at all times, and large ones only towards the end of training.
What is found here:

- Digits, trained to the end: the same. At batch 8 noise dominates from the first step; at batch 512
  it is a third of the mean gradient at the start, and comes to its size late in training. With a
  virtual batch of 8 in place of the rule, batch 512 trains as fast as batch 8, and is there sooner.
- Character GPT: at batch 8, the mean gradient dominates the first thousand windows, in which the
  model learns how frequent each character is, and noise does from then on. At batch 512 the mean
  dominates all of this training, which ends long before its "late".

Images are drawn with replacement: in an epoch, a batch is of images that the parameters have not
been fitted to since the last epoch. Its gradient is no fair draw, and late in training the signal
read from batches of 512 of the 1,024 images is several times too large.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.progress import Progress
from torch import nn

import fusedopt

from . import noise_signal_figure
from .arms import Arm, Task, backend
from .char_gpt import Windows
from .digits_task import IMAGES, Digits
from .moments import measure, model_at

TITLE = "Noise against signal: when does noise dominate the gradient?"
FULL: dict[str, Any] = {
    "digits": {
        "seeds": [0, 1, 2],
        "batches": [8, 64, 512],
        "evaluations": 80,  # epochs
        "hyper": {"lr": 3e-4, "betas": (0.99, 0.999), "eps": 1e-8, "weight_decay": 0.0},
        # Batch sizes of the base batch's virtual batch, besides.
        "virtual": [512],
        # Samples over which signal and noise are averaged.
        "memory": 1024,
        "measured_every": 2,  # evaluations
        "bounds": {"small": 1.5, "early": 0.7, "late": 0.8, "read": 0.3},
    },
    "gpt": {
        "seeds": [0, 1],
        "batches": [8, 64, 512],
        "windows": 16384,
        "evaluations": 32,
        "held_out_windows": 1,
        "model": {"context": 32, "width": 32, "heads": 4, "layers": 2},
        "hyper": {"lr": 3e-4, "betas": (0.99, 0.999), "eps": 1e-8, "weight_decay": 0.0},
        "virtual": [],
        "memory": 1024,
        "measured_samples": 1024,
        "measured_every": 2,
        "bounds": {"start": 1.0, "small": 1.5, "large": 0.7, "read": 0.3},
    },
}
REDUCED: dict[str, Any] = {
    "digits": {
        **FULL["digits"],
        "seeds": [0],
        "batches": [8, 512],
        "evaluations": 10,
        # Ten epochs then come near to an end.
        "hyper": {**FULL["digits"]["hyper"], "lr": 1e-3},
        "measured_every": 1,
        "bounds": {**FULL["digits"]["bounds"], "late": 0.42},
    },
    "gpt": {
        **FULL["gpt"],
        "seeds": [0],
        "batches": [8, 512],
        "windows": 2048,
        "evaluations": 4,
        "model": {"context": 16, "width": 16, "heads": 2, "layers": 1},
        "hyper": {**FULL["gpt"]["hyper"], "lr": 1e-3},
        "measured_samples": 512,
        "measured_every": 1,
        # The average is hardly longer than the training.
        "bounds": {**FULL["gpt"]["bounds"], "read": 0.7},
    },
}
TITLES = {"digits": "digits", "gpt": "character GPT"}
ARMS = {
    "sqrt": Arm("square-root rule", "sqrt", beta_form="power"),
    "virtual": Arm("virtual batch", "decoupled", "sample"),
}


class Drawn(Digits):
    """The digits, drawn with replacement."""

    def __init__(self, settings: dict[str, Any], seed: int) -> None:
        super().__init__(settings["evaluations"], seed, settings["device"])
        generator = torch.Generator().manual_seed(seed)
        self.order = torch.randint(IMAGES, self.order.shape, generator=generator).to(self.order)


def run(settings: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Train at every batch size and seed, and read signal and noise on the way.

    Returns:
        ``tasks[task][arm][batch][seed index]`` with ``read`` and ``measured``: squared norms of the
        mean gradient (signal), and traces of the covariance of one sample's (noise).
    """
    trainings = [
        (name, arm, batch, seed)
        for name in TITLES
        for arm, batches in (("sqrt", "batches"), ("virtual", "virtual"))
        for batch in settings[name][batches]
        for seed in settings[name]["seeds"]
    ]
    bar = progress.add_task("", total=sum(settings[name]["evaluations"] for name, *_ in trainings))
    found: dict[str, Any] = {name: {arm: {} for arm in ARMS} for name in TITLES}
    for name, arm, batch, seed in trainings:
        chosen = {**settings[name], "device": settings["device"]}
        task = Drawn(chosen, seed) if name == "digits" else Windows(chosen, seed)
        row = _train(task, chosen, arm, batch, lambda: progress.advance(bar))
        found[name][arm].setdefault(batch, []).append(row)
    return {"tasks": found}


def _train(
    task: Task, settings: dict[str, Any], arm: str, batch: int, advance: Callable[[], object]
) -> dict[str, Any]:
    model = task.model()
    statistics, optimizer = _optimizer(model, settings, arm, batch)
    decay = math.exp(-batch / settings["memory"])
    read: dict[str, list[float]] = {"signal": [], "noise": []}
    measured = [_measure(task, model, settings)]
    for count, samples in enumerate(task.order.split(batch), 1):
        optimizer.zero_grad()
        task.loss(model, samples).backward()
        scale = statistics.noise_scale(decay)
        optimizer.step()
        evaluation, rest = divmod(count * batch, task.interval)
        if rest == 0:
            read["signal"].append(scale.signal.item())
            read["noise"].append(scale.noise.item())
            if evaluation % settings["measured_every"] == 0:
                measured.append(_measure(task, model, settings))
            advance()
    return {"read": read, "measured": {key: [m[key] for m in measured] for key in measured[0]}}


def _optimizer(
    model: nn.Module, settings: dict[str, Any], arm: str, batch: int
) -> tuple[fusedopt.PerSampleSquares, torch.optim.Optimizer]:
    parameters = list(model.parameters())
    name = backend(parameters[0].device)
    statistics = fusedopt.PerSampleSquares(model, backend=name)
    base = settings["batches"][0]
    hyper = {**ARMS[arm].hyper(settings["hyper"], base, batch), "backend": name}
    if arm == "sqrt":
        return statistics, fusedopt.AdamW(parameters, **hyper)
    decoupled = fusedopt.BatchDecoupledAdam(
        parameters, **hyper, statistics=statistics, virtual_batch_size=base
    )
    return statistics, decoupled


def _measure(task: Task, model: nn.Module, settings: dict[str, Any]) -> dict[str, float]:
    """Return signal and noise from all images, or from the last windows of the training."""
    images = isinstance(task, Drawn)
    samples = torch.arange(IMAGES) if images else task.order[-settings["measured_samples"] :]
    copy = model_at(task, list(model.parameters()))
    moments = measure(task, copy, samples, IMAGES if images else math.inf)
    return {"signal": moments.signal(), "noise": moments.noise()}


def noise_over_signal(entry: dict[str, list[float]], batch: int) -> list[float]:
    """Return sqrt(tr Sigma / batch) / |mu|, nan where the estimate of |mu|^2 is not positive."""
    pairs = zip(entry["noise"], entry["signal"], strict=True)
    return [math.sqrt(noise / batch / s) if s > 0 else math.nan for noise, s in pairs]


def claims(result: dict[str, Any]) -> list[tuple[str, float, float, bool]]:
    """Return what the figures must show, in every seed."""
    stated = []
    for name, title in TITLES.items():
        seeds = result["figures"]["tasks"][name]["sqrt"]
        bounds = result["settings"][name]["bounds"]
        small, large = min(seeds), max(seeds)
        ratios = {
            batch: [noise_over_signal(row["measured"], batch) for row in rows]
            for batch, rows in seeds.items()
        }
        of = _digits_claims if name == "digits" else _gpt_claims
        at = [f"{title}, batch {batch}: noise over mean gradient" for batch in (small, large)]
        stated += of(at, ratios[small], ratios[large], bounds)
        every = result["settings"][name]["measured_every"]
        off = max(_disagreement(row, every) for rows in seeds.values() for row in rows)
        text = f"{title}: noise read against noise measured, |log|, second half, at most"
        stated.append(_at_most(text, off, bounds["read"]))
    return stated


def _digits_claims(
    at: list[str], small: list[list[float]], large: list[list[float]], bounds: dict[str, float]
) -> list[tuple[str, float, float, bool]]:
    least = min(min(row) for row in small)
    early = max(max(row[: len(row) // 5]) for row in large)
    late = min(_geometric_mean(row[-(len(row) // 5) :]) for row in large)
    return [
        _at_least(f"{at[0]}, at least", least, bounds["small"]),
        _at_most(f"{at[1]}, first fifth, at most", early, bounds["early"]),
        _at_least(f"{at[1]}, mean of the last fifth, at least", late, bounds["late"]),
    ]


def _gpt_claims(
    at: list[str], small: list[list[float]], large: list[list[float]], bounds: dict[str, float]
) -> list[tuple[str, float, float, bool]]:
    first = max(row[0] for row in small)
    later = min(min(row[len(row) // 2 :]) for row in small)
    most = max(max(row) for row in large)
    return [
        _at_most(f"{at[0]}, at the start, at most", first, bounds["start"]),
        _at_least(f"{at[0]}, second half, at least", later, bounds["small"]),
        _at_most(f"{at[1]}, at most", most, bounds["large"]),
    ]


def _geometric_mean(values: list[float]) -> float:
    return math.exp(fmean(map(math.log, values)))


def _disagreement(row: dict[str, Any], every: int) -> float:
    """Return the mean of |log(noise read / noise measured)| in the second half."""
    pairs = zip(row["read"]["noise"][every - 1 :: every], row["measured"]["noise"][1:], strict=True)
    logs = [abs(math.log(a / b)) for a, b in pairs]
    return fmean(logs[len(logs) // 2 :])


def _at_most(text: str, value: float, bound: float) -> tuple[str, float, float, bool]:
    return text, value, bound, value <= bound


def _at_least(text: str, value: float, bound: float) -> tuple[str, float, float, bool]:
    return text, value, bound, value >= bound


def draw(result: dict[str, Any]) -> Figure:
    """Plot both norms for each batch size, and their ratio."""
    return noise_signal_figure.draw(result, TITLES)
