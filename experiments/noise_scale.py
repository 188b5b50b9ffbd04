"""The gradient noise scale from one batch, against its true value and the two-batch estimator.

The gradients are synthetic: an output of a linear layer with input 1 is a weight, so that a loss
``weight @ g_i`` has exactly g_i for its gradient, and g_i is drawn from a normal distribution of
known mean and variances. The noise scale is tr(Sigma) / |G|^2, in samples (McCandlish et al., arXiv
1812.06162); the estimator from two batches is that of their appendix A.1, here with the batch's
gradient and that of its first samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.progress import Progress
from torch import Tensor

import fusedopt

from .arms import backend

TITLE = "Noise scale: is the estimate from one batch unbiased?"
FULL = {
    "dimension": 256,
    "batch": 64,
    "small_batch": 8,
    "scales": [2.0, 16.0, 128.0],  # true tr(Sigma) / |G|^2, samples
    "draws": 4000,
    "seed": 0,
}
REDUCED = {"draws": 300}
NAMES = {"per_sample": "statistics.noise_scale()", "two_batch": "two batches"}


def run(settings: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Draw batches and estimate signal and noise from each, in both ways."""
    bar = progress.add_task("", total=len(settings["scales"]) * settings["draws"])
    generator = torch.Generator().manual_seed(settings["seed"])
    found = []
    for scale in settings["scales"]:
        mean, spread = _distribution(settings["dimension"], scale, generator)
        layer = torch.nn.Linear(1, len(mean), bias=False, dtype=torch.float64)
        layer.to(settings["device"])
        estimate = _estimator(layer, settings["small_batch"])
        rows = []
        for _ in range(settings["draws"]):
            noise = torch.randn(settings["batch"], len(mean), generator=generator).double()
            rows.append(estimate((mean + noise * spread).to(settings["device"])))
            progress.advance(bar)
        estimates = torch.tensor(rows, dtype=torch.float64)  # [draw, method, signal or noise]
        true = mean.square().sum().item(), spread.square().sum().item()
        found.append({"scale": scale, **_summary(estimates, true)})
    return {"scales": found}


def _distribution(
    dimension: int, scale: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return a mean of length 1, and standard deviations whose squares sum to `scale`."""
    mean = torch.randn(dimension, generator=generator).double()
    # Unequal, as in a network: variances over two orders of magnitude.
    spread = torch.logspace(-1, 0, dimension, dtype=torch.float64)
    return mean / mean.norm(), spread * math.sqrt(scale) / spread.norm()


def _estimator(layer: torch.nn.Module, small: int) -> Callable[[Tensor], list[list[float]]]:
    statistics = fusedopt.PerSampleSquares(layer, backend=backend(layer.weight.device))

    def estimate(gradients: Tensor) -> list[list[float]]:
        layer.weight.grad = None
        statistics.reset()
        outputs = layer(gradients.new_ones(len(gradients), 1))
        (outputs * gradients).sum(1).mean().backward()
        ours = statistics.noise_scale()
        squares = [g.mean(0).square().sum().item() for g in (gradients[:small], gradients)]
        theirs = _two_batches(*squares, small, len(gradients))
        return [[ours.signal.item(), ours.noise.item()], theirs]

    return estimate


def _two_batches(small_square: float, large_square: float, small: int, large: int) -> list[float]:
    """Return |G|^2 and tr(Sigma) from the squared norms of the gradients of two batch sizes."""
    signal = (large * large_square - small * small_square) / (large - small)
    return [signal, (small_square - large_square) / (1 / small - 1 / large)]


def _summary(estimates: Tensor, true: tuple[float, float]) -> dict[str, Any]:
    root = math.sqrt(len(estimates))
    found: dict[str, Any] = {}
    for i, method in enumerate(NAMES):
        for j, quantity in enumerate(("signal", "noise")):
            values = estimates[:, i, j]
            mean, deviation = values.mean().item(), values.std().item()
            found.setdefault(method, {})[quantity] = {
                "true": true[j],
                "mean": mean,
                "standard_deviation": deviation,
                "standard_error": deviation / root,
                "bias_in_standard_errors": (mean - true[j]) / (deviation / root),
                "percentiles_5_25_50_75_95": _percentiles(values),
            }
        ratio = found[method]["noise"]["mean"] / found[method]["signal"]["mean"]
        found[method]["ratio_of_means"] = ratio
    return found


def _percentiles(values: Tensor) -> list[float]:
    points = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=values.dtype)
    return values.quantile(points).tolist()


def claims(result: dict[str, Any]) -> list[tuple[str, float, float, bool]]:
    """Return what the figures must show, over all noise scales."""
    rows = result["figures"]["scales"]
    ours = [row["per_sample"][quantity] for row in rows for quantity in ("signal", "noise")]
    bias = max(abs(entry["bias_in_standard_errors"]) for entry in ours)
    stated = [("bias of signal and noise, standard errors, at most", bias, 3.5, bias <= 3.5)]
    for quantity, bound in (("signal", 1.0), ("noise", 3.0)):
        gain = min(
            _deviation(row, "two_batch", quantity) / _deviation(row, "per_sample", quantity)
            for row in rows
        )
        text = f"standard deviation of the {quantity}, two batches over ours, at least"
        stated.append((text, gain, bound, gain >= bound))
    return stated


def _deviation(row: dict[str, Any], method: str, quantity: str) -> float:
    deviation: float = row[method][quantity]["standard_deviation"]
    return deviation


def draw(result: dict[str, Any]) -> Figure:
    """Plot the spread of both estimators over the true value, for signal and noise."""
    settings, rows = result["settings"], result["figures"]["scales"]
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    figure.suptitle(
        f"Estimates from {settings['draws']} batches of {settings['batch']} synthetic gradients"
        f" in {settings['dimension']} dimensions"
    )
    panels = figure.subplots(1, 2)
    for axes, quantity in zip(panels, ("signal", "noise"), strict=True):
        for i, (method, color) in enumerate(zip(NAMES, ("#b30000", "#9e9e9e"), strict=True)):
            boxes = [_box(row[method][quantity]) for row in rows]
            places = [place + 0.36 * i - 0.18 for place in range(len(rows))]
            drawn = axes.bxp(boxes, places, widths=0.3, showfliers=False, patch_artist=True)
            for patch in drawn["boxes"]:
                patch.set(facecolor=color, alpha=0.7)
            for median in drawn["medians"]:
                median.set(color="black")
            means = [row[method][quantity]["mean"] / row[method][quantity]["true"] for row in rows]
            axes.plot(places, means, "D", color="white", mec="black", ms=5)
            axes.plot([], [], "s", color=color, ms=9, label=NAMES[method])
        axes.axhline(1.0, color="black", lw=1, ls="--")
        axes.set_xticks(range(len(rows)), [f"{row['scale']:g}" for row in rows])
        axes.set_xlabel("true noise scale, samples")
        axes.grid(alpha=0.3, axis="y")
    panels[0].set_ylabel("estimate / true value")
    panels[0].set_title("signal |G|²")
    panels[1].set_title("noise tr Σ")
    handles, labels = panels[0].get_legend_handles_labels()
    title = "box: quartiles; whiskers: 5 to 95 %; diamond: mean"
    figure.legend(handles, labels, title=title, ncols=2, loc="outside lower center")
    return figure


def _box(entry: dict[str, Any]) -> dict[str, float]:
    low, first, median, third, high = (
        x / entry["true"] for x in entry["percentiles_5_25_50_75_95"]
    )
    return {"whislo": low, "q1": first, "med": median, "q3": third, "whishi": high}
