"""The picture of ``square_root``."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from . import drift

# From the base batch on: light to dark.
SHADES = ("#fdae6b", "#e6550d", "#a50f15", "#3b0710")
# Of points on the path: early to late.
BLUES = ("#6baed6", "#2171b5", "#08306b")
TASK_STYLES = (("o", "#a50f15"), ("s", "#2171b5"))


def draw(result: dict[str, Any], titles: dict[str, str]) -> Figure:
    """Plot losses and M1 above, drift below, with the predictions."""
    settings, figures = result["settings"], result["figures"]
    figure = Figure(figsize=(15, 8.8), layout="constrained")
    figure.suptitle(
        "Adam with the square-root rule: the same samples in the same order, cut into batches of"
        f" {settings['digits']['batches'][0]} to {settings['digits']['batches'][-1]}.\n"
        "Solid or markers: measured; dashed: predicted from mean and variance of the gradients at"
        " the base batch, nothing fitted",
    )
    top, bottom = figure.subplots(2, 3)
    for axes, lower, name in zip(top, bottom, titles, strict=False):
        chosen, seeds = settings[name], figures["tasks"][name]
        x, label = _samples(name, chosen)
        _draw_losses(axes, chosen, seeds, x)
        axes.set(
            xlabel=label, ylabel=f"{_kind(name)} loss, nats", title=_heading(titles, name, chosen)
        )
        _draw_frozen(lower, chosen, seeds, [0.0, *x], label)
        lower.set_title(f"{titles[name]}: at frozen parameters of the base training")
    _draw_distances(top[2], settings, figures["tasks"], titles)
    _draw_scalar(bottom[2], settings["scalar"], figures["scalar"])
    return figure


def _kind(name: str) -> str:
    return "training" if name == "digits" else "held-out"


def _heading(titles: dict[str, str], name: str, settings: dict[str, Any]) -> str:
    number = len(settings["seeds"])
    seeds = f"{number} seeds, band: range" if number > 1 else "one seed"
    return (
        f"{titles[name]}, lr {settings['hyper']['lr']:g} at batch {settings['batches'][0]}; {seeds}"
    )


def _samples(name: str, settings: dict[str, Any]) -> tuple[list[float], str]:
    evaluations = settings["evaluations"]
    if name == "digits":
        return [float(i) for i in range(1, evaluations + 1)], "epochs"
    interval = settings["windows"] / evaluations
    return [interval * i for i in range(1, evaluations + 1)], "windows seen"


def _draw_losses(
    axes: Axes, settings: dict[str, Any], seeds: list[dict[str, Any]], x: list[float]
) -> None:
    for batch, shade in zip(settings["batches"], SHADES, strict=False):
        curves = np.array([seed["losses"][batch] for seed in seeds])
        axes.fill_between(x, curves.min(0), curves.max(0), color=shade, alpha=0.3, lw=0)
        mean = np.exp(np.log(curves).mean(0))
        axes.plot(x, mean, color=shade, lw=2, label=f"batch {batch}")
        if batch != settings["batches"][0]:
            predicted = np.array([seed["predicted_losses"][batch] for seed in seeds])
            axes.plot(x, np.exp(np.log(predicted).mean(0)), "k--", lw=1.1, zorder=3)
    axes.plot([], [], "k--", lw=1.1, label="predicted")
    _log_y(axes)
    axes.legend(fontsize="small")


def _log_y(axes: Axes) -> None:
    """Label a logarithmic axis with plain numbers, and minor ticks where they are few."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    digits = "25" if high / low > 4 else "123456789"
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in digits else "")
    axes.tick_params(axis="y", which="minor", labelsize="small")
    axes.grid(alpha=0.3, which="both")


def _draw_frozen(
    axes: Axes, settings: dict[str, Any], seeds: list[dict[str, Any]], x: list[float], label: str
) -> None:
    base, *larger = settings["batches"]
    kappas = [batch / base for batch in larger]
    for place, shade in zip(settings["frozen"], BLUES, strict=False):
        at = settings["path"].index(place)
        predicted = [fmean(seed["drift"][batch][at] for seed in seeds) for batch in larger]
        axes.plot([1, *kappas], [1, *predicted], "--", color=shade, lw=1.3)
        for seed in seeds:
            values = [seed["frozen"][place][batch] for batch in larger]
            axes.plot(kappas, values, "o", color=shade, ms=5, mew=0, alpha=0.8)
        title = (
            "at the start" if place == 0 else f"after {x[place]:g} {label.removesuffix(' seen')}"
        )
        axes.plot([], [], "o--", color=shade, ms=5, label=title)
    _draw_kappa(axes, [1, *kappas])
    axes.set_ylabel("descent per sample, over that at the base batch")
    axes.legend(fontsize="small", loc="lower left")


def _draw_kappa(axes: Axes, kappas: list[float]) -> None:
    """Draw what the rule is meant to keep, and the slowest that it can be."""
    axes.axhline(1.0, color="#757575", lw=1)
    axes.annotate(
        "what the rule is for",
        (kappas[-1], 1.0),
        (0, -3),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize="small",
        color="#757575",
    )
    axes.plot(kappas, [k**-0.5 for k in kappas], ":", color="#757575", lw=1.4)
    axes.annotate("no noise: kappa^-1/2", (kappas[-1], kappas[-1] ** -0.5), (0, -4),
                  textcoords="offset points", ha="right", va="top", fontsize="small",
                  color="#757575")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="kappa, batch over base batch")
    axes.set_xticks(kappas, [f"{k:g}" for k in kappas])
    axes.set_xticks([], minor=True)
    ticks = [0.1, 0.2, 0.3, 0.5, 0.7, 1.0]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_yticks([], minor=True)
    axes.set_ylim(min(kappas[-1] ** -0.5 * 0.8, 0.5), 1.15)
    axes.grid(alpha=0.3)


def _draw_distances(
    axes: Axes, settings: dict[str, Any], tasks: dict[str, Any], titles: dict[str, str]
) -> None:
    for (name, seeds), (marker, color) in zip(tasks.items(), TASK_STYLES, strict=True):
        base, *larger = settings[name]["batches"]
        kappas = [batch / base for batch in larger]
        for seed in seeds:
            axes.plot(kappas, [seed["M1"][b] for b in larger], marker, color=color, ms=5, mew=0,
                      alpha=0.7)  # fmt: skip
        measured = [fmean(seed["M1"][b] for seed in seeds) for b in larger]
        predicted = [fmean(seed["predicted_M1"][b] for seed in seeds) for b in larger]
        axes.plot(kappas, measured, "-", color=color, lw=1.8)
        axes.plot(kappas, predicted, "--", color=color, lw=1.3)
        axes.plot([], [], f"{marker}-", color=color, label=titles[name])
    axes.plot([], [], "k--", lw=1.3, label="predicted")
    axes.set(xscale="log", yscale="log", xlabel="kappa, batch over base batch")
    axes.set_xticks(kappas, [f"{k:g}" for k in kappas])
    axes.set_xticks([], minor=True)
    axes.set_ylabel("M1, RMS over time of the log of the losses' ratio")
    axes.set_title("distance from the base batch, a point a seed")
    _log_y(axes)
    axes.legend(fontsize="small")


def _draw_scalar(axes: Axes, settings: dict[str, Any], found: dict[str, Any]) -> None:
    r = np.logspace(-4, 1.5, 200)
    slow, trainings = found["slow"], found["trainings"]
    for kappa, shade in zip(slow, SHADES[1:], strict=False):
        line = [drift.ratio(x, settings["base_batch"], float(kappa)) for x in r]
        axes.plot(r, line, "--", color=shade, lw=1.3)
        axes.plot(
            settings["r"], slow[kappa]["drift"], "o", color=shade, ms=5, label=f"kappa {kappa}"
        )
        axes.plot(settings["r"], trainings[kappa]["drift"], "+", color=shade, ms=9)
    kinds = [
        Line2D([], [], marker=marker, ls="", color="k", label=f"betas {settings['betas'][name]}")
        for marker, name in (("o", "slow"), ("+", "trainings"))
    ]
    kinds.append(Line2D([], [], ls="--", color="k", label="predicted, D(kappa)"))
    axes.legend(handles=[*axes.get_legend_handles_labels()[0], *kinds], fontsize="small")
    axes.set(xscale="log", yscale="log", xlabel="r, squared mean over variance of one gradient")
    axes.set_ylabel(f"movement per sample, over that at batch {settings['base_batch']}")
    axes.set_title("scalar Gaussian gradients")
    ticks = [0.1, 0.2, 0.3, 0.5, 0.7, 1.0]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_yticks([], minor=True)
    axes.grid(alpha=0.3)
