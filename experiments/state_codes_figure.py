"""The picture of ``state_codes``."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

SOURCES = {
    "once": ("synthetic, 1 M elements", "#757575"),
    "student": ("synthetic", "#bdbdbd"),
    "shift": ("gradients of half the columns fall 30 times", "#a50f15"),
    "rest": ("half the columns rest beside constant ones", "#fb6a4a"),
    "digits": ("digits", "#08519c"),
    "gpt": ("character GPT", "#6baed6"),
    "embedding": ("embedding, rare rows", "#31a354"),
}


def draw(result: dict[str, Any]) -> Figure:
    """Plot errors of the next update by pair and source, and changes of losses."""
    figures = result["figures"]
    figure = Figure(figsize=(17, 8.5), layout="constrained")
    figure.suptitle(
        "Codes of Adam's states: error of the next update (normalised mean square, new gradient,"
        " mean of the seeds), and what it does to the loss"
    )
    once, closed, losses = figure.subplots(1, 3, width_ratios=[1, 1, 0.8])
    titles = figures["titles"]
    _draw_errors(once, figures["once"], titles)
    once.set_title("one-shot: coded once")
    _draw_errors(closed, figures["closed"], titles)
    closed.set_title("closed loop: coded after every step")
    _draw_losses(losses, figures["losses"], titles)
    losses.set_title("loss over float32 states', less 1")
    figure.legend(*once.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _rows(axes: Axes, names: list[str], titles: dict[str, str]) -> None:
    axes.set_yticks(range(len(names)), [titles[name] for name in names], fontsize="small")
    axes.invert_yaxis()
    axes.grid(alpha=0.3)


def _draw_errors(axes: Axes, errors: dict[str, Any], titles: dict[str, str]) -> None:
    names = list(next(iter(errors.values())))
    for source, pairs in errors.items():
        label, color = SOURCES[source]
        # What is infinite or no number is beyond the axis, and so is a v that became 0.
        means = [_mean([row["new"] for row in pairs[name]]) for name in names]
        shown = [(min(x, 1.5), i) for i, x in enumerate(means)]
        axes.plot(*zip(*shown, strict=True), "o", color=color, ms=6, alpha=0.85, label=label)
    _rows(axes, names, titles)
    axes.set(xscale="log", xlim=(2e-6, 2.0), xlabel="error (1.5: more than 1)")


def _mean(values: list[float | None]) -> float:
    return math.inf if None in values else math.fsum(values) / len(values)


def _draw_losses(axes: Axes, tasks: dict[str, Any], titles: dict[str, str]) -> None:
    names = [name for name in next(iter(tasks.values())) if name != "float32"]
    for shift, (task, losses) in zip((-0.2, 0.0, 0.2), tasks.items(), strict=False):
        color = SOURCES[task][1]
        for i, name in enumerate(names):
            changes = [
                100 * (a / b - 1) for a, b in zip(losses[name], losses["float32"], strict=True)
            ]
            places = [i + shift] * len(changes)
            axes.plot(changes, places, "o", color=color, ms=4, alpha=0.5)
            mean = math.fsum(changes) / len(changes)
            axes.plot([mean], [i + shift], "|", color=color, ms=14, mew=2.5)
    _rows(axes, names, titles)
    axes.axvspan(-0.5, 0.5, color="#757575", alpha=0.15, lw=0)
    axes.set_xlabel("per cent; bars: means; grey: 0.5")
