"""The picture of the bias corrections: averages of synthetic gradients above, trainings below."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Titles, colors and lines of the arms.
STYLES = {
    "none": ("AdamW, none", "#757575", "-"),
    "adam": ("AdamW, Adam's", "#08519c", "-"),
    "running_mean": ("AdamW, running mean", "#b30000", "-"),
    "rmsprop_none": ("RMSprop, none", "#bdbdbd", "--"),
    "rmsprop": ("RMSprop, Adam's", "#6baed6", "--"),
}


def draw(result: dict[str, Any]) -> Figure:
    """Plot bias, spread, step length and losses."""
    settings = result["settings"]
    figure = Figure(figsize=(15, 8.5), layout="constrained")
    beta1, beta2 = settings["betas"]
    figure.suptitle(
        f"The first {settings['steps']} steps without a bias correction and with: AdamW, betas"
        f" {beta1:g} and {beta2:g}, and RMSprop, alpha {settings['alpha']:g}"
    )
    (bias, spread, ratio), (step, losses, sweep) = figure.subplots(2, 3)
    _draw_moments(bias, result, "mean", "average over its true value")
    _draw_moments(spread, result, "deviation", "standard deviation over the true value")
    spread.set_yscale("log")
    _draw_ratio(ratio, result)
    _draw_steps(step, result)
    _draw_losses(losses, result)
    _draw_sweep(sweep, result)
    bias.set_title(f"bias, synthetic gradients, {settings['replicas']:,} replicas")
    spread.set_title("spread (solid: first moment, dotted: second)")
    for axes in (bias, spread, ratio, step):
        axes.set(xscale="log", xlabel="step")
    handles, labels = step.get_legend_handles_labels()
    figure.legend(handles, labels, ncols=len(STYLES), loc="outside lower center")
    return figure


def _draw_moments(axes: Axes, result: dict[str, Any], key: str, label: str) -> None:
    for name in ("none", "adam", "running_mean"):
        entry = result["figures"]["synthetic"][name]
        # Coincide in both: the one drawn last is thin.
        width = 1.6 if name == "running_mean" else 4
        for moment, line in (("first", "-"), ("second", ":")):
            values = entry[moment][key]
            axes.plot(range(1, len(values) + 1), values, line, color=STYLES[name][1], lw=width)
    axes.set_ylabel(label)
    axes.grid(alpha=0.3, which="both")


def _draw_ratio(axes: Axes, result: dict[str, Any]) -> None:
    figures = result["figures"]
    for moment, marker in (("first", "o"), ("second", "s")):
        style = {"color": "#b30000", "ms": 3, "mfc": "none", "label": f"{moment} moment"}
        measured, theory = figures["ratios"][moment], figures["theory"][moment]
        axes.plot(range(1, len(theory) + 1), theory, color="black", lw=1)
        axes.plot(range(1, len(measured) + 1), measured, marker, **style)
    axes.plot([], [], color="black", lw=1, label="theory")
    axes.set_ylabel("standard deviation, running mean / Adam's")
    axes.set_title("what equal weights gain")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")


def _draw_steps(axes: Axes, result: dict[str, Any]) -> None:
    for name, (title, color, line) in STYLES.items():
        lengths = result["figures"]["synthetic"][name]["step"]
        style = {"color": color, "label": title, "lw": 2}
        axes.plot(range(1, len(lengths) + 1), lengths, line, **style)
    axes.set(yscale="log", ylabel="root mean square of the update over lr")
    axes.set_title("step length, synthetic gradients")
    axes.grid(alpha=0.3, which="both")


def _draw_losses(axes: Axes, result: dict[str, Any]) -> None:
    settings = result["settings"]
    for name, (_, color, line) in STYLES.items():
        columns = list(zip(*result["figures"]["losses"][name], strict=True))
        steps = range(1, len(columns) + 1)
        axes.plot(steps, [fmean(column) for column in columns], line, color=color, lw=2)
        low, high = ([pick(column) for column in columns] for pick in (min, max))
        axes.fill_between(steps, low, high, color=color, alpha=0.2, lw=0)
    axes.set(xlabel="step", ylabel="training loss, nats")
    axes.set_title(f"digits, lr {settings['lr']:g} (band: {len(settings['seeds'])} seeds)")
    axes.grid(alpha=0.3)


def _draw_sweep(axes: Axes, result: dict[str, Any]) -> None:
    settings = result["settings"]
    for name, (_, color, line) in STYLES.items():
        last = result["figures"]["last"][name]
        means = [fmean(values) for values in last.values()]
        axes.plot(list(last), means, line, marker="o", ms=4, color=color, lw=2)
        for lr, values in last.items():
            axes.plot([lr] * len(values), values, ".", color=color, ms=3)
    axes.set(xscale="log", yscale="log", xlabel="lr", ylabel="training loss, nats")
    axes.set_title(f"digits after {settings['steps']} steps (dots: seeds)")
    axes.grid(alpha=0.3, which="both")
