"""The picture of ``noise_signal``."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

SIGNAL, NOISE = "#a50f15", "#2171b5"
# From the base batch on: light to dark.
SHADES = ("#fdae6b", "#e6550d", "#3b0710")


def draw(result: dict[str, Any], titles: dict[str, str]) -> Figure:
    """Plot both norms for each batch size, and their ratio."""
    settings, tasks = result["settings"], result["figures"]["tasks"]
    columns = max(len(settings[name]["batches"]) for name in titles)
    figure = Figure(figsize=(4 * columns + 5, 8), layout="constrained")
    base = settings["digits"]["batches"][0]
    figure.suptitle(
        f"Adam with the square-root rule from batch {base} on: the mean gradient against the noise"
        " of a batch's gradient.\nLines: read by statistics.noise_scale() from the batches trained"
        " on (mean and range of the seeds); dots: from many samples at once,"
        " as at right"
    )
    panels = figure.subplots(2, columns + 1, width_ratios=[1] * columns + [1.25])
    for row, name in zip(panels, titles, strict=True):
        x, label = _samples(name, settings[name])
        for axes in row:
            axes.set(yscale="log", xlabel=label)
            axes.grid(alpha=0.3)
        arms = tasks[name]
        for axes, batch in zip(row, settings[name]["batches"], strict=False):
            _draw_norms(axes, arms["sqrt"][batch], batch, x)
            axes.set_title(f"{titles[name]}, batch {batch}")
            axes.sharey(row[0])
        _draw_ratios(row[-1], arms, x, base)
        row[-1].set_title(f"{titles[name]}: noise / mean gradient (grey: below 1)")
        row[0].set_ylabel("norm of the gradient, nats per unit of weight")
    handles = [
        Line2D([], [], color=SIGNAL, lw=2, label="mean gradient, |mu|"),
        Line2D([], [], color=NOISE, lw=2, label="noise, sqrt(tr Sigma / B)"),
    ]
    panels[0, 0].legend(handles=handles, fontsize="small")
    return figure


def _samples(name: str, settings: dict[str, Any]) -> tuple[np.ndarray, str]:
    """Return the abscissa of evaluations from 0 on, and its label."""
    evaluations = settings["evaluations"]
    if name == "digits":
        return np.arange(evaluations + 1.0), "samples seen / 1024"
    return np.linspace(0, settings["windows"], evaluations + 1), "windows seen"


def _draw_norms(axes: Axes, seeds: list[dict[str, Any]], batch: int, x: np.ndarray) -> None:
    for key, color, divisor in (("signal", SIGNAL, 1), ("noise", NOISE, batch)):
        read = _root(seeds, "read", key, divisor)
        _band(axes, x[1:], read, color, lw=1.8)
        measured = _root(seeds, "measured", key, divisor)
        places = np.linspace(x[0], x[-1], measured.shape[1])
        axes.plot(places, measured.T, ".", color=color, ms=5, mec="white", mew=0.3)


def _root(seeds: list[dict[str, Any]], source: str, key: str, divisor: float) -> np.ndarray:
    """Return norms, [seed, place], nan where the square's estimate is not positive."""
    squares = np.array([seed[source][key] for seed in seeds], dtype=float) / divisor
    return np.sqrt(np.where(squares > 0, squares, np.nan))


def _band(axes: Axes, x: np.ndarray, values: np.ndarray, color: str, **style: Any) -> None:
    """Draw the geometric mean and the range of the seeds that have a value; gaps if none has."""
    logs = np.log(np.ma.masked_invalid(values))
    low, mean, high = (np.exp(f(0).filled(np.nan)) for f in (logs.min, logs.mean, logs.max))
    axes.fill_between(x, low, high, color=color, alpha=0.2, lw=0)
    axes.plot(x, mean, color=color, **style)


def _draw_ratios(axes: Axes, arms: dict[str, Any], x: np.ndarray, base: int) -> None:
    for arm, line, text in (
        ("sqrt", "-", "batch {}"),
        ("virtual", "--", "batch {}, virtual batch"),
    ):
        for batch, seeds in arms[arm].items():
            ratios = _root(seeds, "measured", "noise", batch) / _root(
                seeds, "measured", "signal", 1
            )
            places = np.linspace(x[0], x[-1], ratios.shape[1])
            shade = SHADES[list(arms["sqrt"]).index(batch)]
            label = text.format(batch) + (f" {base}" if arm == "virtual" else "")
            _band(axes, places, ratios, shade, ls=line, lw=1.8, label=label)
    low, _ = axes.get_ylim()
    axes.set_ylim(bottom=low / 3)
    axes.axhspan(low / 3, 1.0, color="#757575", alpha=0.12, lw=0)
    axes.axhline(1.0, color="black", lw=1)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(fontsize="small", loc="lower right", ncols=2)
