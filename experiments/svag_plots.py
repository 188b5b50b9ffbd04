"""The picture of the experiment ``svag``."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

# Light to dark as steps get finer; the SDE below them all.
_COLORS = {"1": "#fdae6b", "2": "#e6550d", "4": "#7f2704"}
_SDE: dict[str, Any] = {"color": "#9ecae1", "lw": 7, "solid_capstyle": "round"}
_FUNCTIONS = ("#08519c", "#6baed6", "#b30000", "#252525")
_MARKS = ("o", "s", "^", "D")
_TIME = {"SGD": "time, lr × steps", "RMSprop": "time, lr² × steps", "Adam": "time, lr² × steps"}


def draw(result: dict[str, Any]) -> Figure:
    """Return the picture of a result."""
    settings, found = result["settings"], result["figures"]
    replicas = settings["chunks"] * settings["replicas"]
    figure = Figure(figsize=(14, 15.5), layout="constrained")
    figure.suptitle(
        "SVAG with l = 1, 2, 4 and the SDE that it must approach"
        f"\nNoisy quadratic in {len(settings['curvatures'])} dimensions, {replicas:,} replicas on"
        " shared Brownian motions; and the digits",
        fontsize="x-large",
    )
    panels = figure.subplots(4, 3)
    for i, (kind, entry) in enumerate(found["near"].items()):
        _curves(panels[0, i], kind, entry)
        _differences(panels[1, i], kind, entry)
        _orders(panels[2, i], kind, entry)
    panels[0, 0].set_ylabel("mean loss")
    panels[1, 0].set_ylabel("mean loss − the SDE's")
    panels[2, 0].set_ylabel("weak error, RMS over time\nof the difference of means")
    for axes in panels[:3, 0]:
        axes.legend(fontsize="small")
    _far(panels[3, 0], settings, found["far"])
    for axes, name in zip(panels[3, 1:], ("noise", "signal"), strict=True):
        _digits(axes, settings["digits"], name, found["digits"][name])
    for axes in panels.flat:
        axes.grid(alpha=0.3, which="both")
    return figure


def _label(name: str) -> str:
    return f"l = {name}"


def _svag(values: dict[str, Any]) -> dict[str, Any]:
    """Return what belongs to SVAG, by l; l = 1 is the optimizer itself."""
    chosen = {"1": values["1"]}
    return chosen | {n.split()[1]: value for n, value in values.items() if n.startswith("SVAG")}


def _curves(axes: Axes, kind: str, entry: dict[str, Any]) -> None:
    curves = entry["curves"]["loss"]
    axes.plot(entry["time"], curves["SDE"]["mean"], **_SDE, label="SDE")
    for (name, curve), style in zip(_svag(curves).items(), ("-", "--", ":"), strict=False):
        color = _COLORS[name]
        axes.plot(entry["time"], curve["mean"], style, color=color, lw=2, label=_label(name))
    axes.set_yscale("log")
    axes.set_title(f"{kind}: curves that coincide …")
    axes.set_xlabel(_TIME[kind])


def _differences(axes: Axes, kind: str, entry: dict[str, Any]) -> None:
    axes.axhline(0.0, **{**_SDE, "lw": 4})
    for name, curve in _svag(entry["curves"]["loss"]).items():
        mean, error = (torch.tensor(curve[key]) for key in ("difference", "standard_error"))
        axes.plot(entry["time"], mean, "o-", ms=3, color=_COLORS[name], label=_label(name))
        band = (mean - 2 * error).tolist(), (mean + 2 * error).tolist()
        axes.fill_between(entry["time"], *band, color=_COLORS[name], alpha=0.3, lw=0)
    axes.set_title("… and how far they are off; band: 2 standard errors", fontsize="medium")
    axes.set_xlabel(_TIME[kind])


def _orders(axes: Axes, kind: str, entry: dict[str, Any]) -> None:
    steps = entry["step"]
    for (function, errors), color, mark in zip(
        entry["weak_error"].items(), _FUNCTIONS, _MARKS, strict=False
    ):
        slope, doubt = entry["slope"][function]
        plain = [name for name in errors if name.isdigit()]
        x = [steps[name] for name in plain]
        y, bars = zip(*(errors[name] for name in plain), strict=True)
        label = f"{function}: slope {slope:.2f} ± {doubt:.2f}"
        style: dict[str, Any] = {"fmt": mark + "-", "ms": 4, "lw": 1, "capsize": 2, "color": color}
        axes.errorbar(x, y, [2 * bar for bar in bars], **style, label=label)
        amplified = [name for name in errors if not name.isdigit()]
        points = [(steps[name], errors[name][0]) for name in amplified]
        axes.plot(*zip(*points, strict=True), mark, ms=11, mfc="none", mec=color, mew=1.2)
    axes.plot([], [], "o", ms=11, mfc="none", mec="black", label="SVAG, l = 2 and 4")
    ends = [steps["1"], min(steps.values())]
    first = max(errors["1"][0] for errors in entry["weak_error"].values()) * 1.6
    axes.plot(ends, [first * end / ends[0] for end in ends], "k--", lw=1, label="slope 1")
    axes.set(xscale="log", yscale="log")
    ticks = sorted(set(steps.values()))
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize="small")
    axes.xaxis.set_minor_locator(NullLocator())
    unit = "lr" if kind == "SGD" else "lr²"
    axes.set_xlabel(f"time of a step, {unit}; noise grows as it falls")
    axes.set_title(f"{kind}: error against step; bars: 2 standard errors", fontsize="medium")
    low, high = axes.get_ylim()
    # Room below for the legend.
    axes.set_ylim(low / 3, high)
    axes.legend(fontsize="x-small", loc="lower right")


def _far(axes: Axes, settings: dict[str, Any], far: dict[str, Any]) -> None:
    kind, entry = next(iter(far.items()))
    _curves(axes, kind, entry)
    axes.set_title(
        f"{kind} from {settings['far']['start']:g} instead of {settings['start']:g}: the signal\n"
        "dominates, which the SDE does not know",
        fontsize="medium",
    )
    axes.set_ylabel("mean loss")
    axes.legend(fontsize="small")


def _digits(axes: Axes, settings: dict[str, Any], name: str, entry: dict[str, Any]) -> None:
    arm = settings["arms"][name]
    count = len(next(iter(entry["losses"].values()))[0])
    steps = [arm["steps"] * i / (count - 1) for i in range(count)]
    for ell, losses in entry["losses"].items():
        values = torch.tensor(losses)
        mean, spread = values.mean(0), values.std(0)
        color = _COLORS[str(ell)]
        axes.plot(steps, mean, "o-", ms=3, color=color, label=_label(str(ell)))
        band = (mean - spread).tolist(), (mean + spread).tolist()
        axes.fill_between(steps, *band, color=color, alpha=0.2, lw=0)
    low, high = sorted(entry["noise_scale"])
    which = "noise dominates" if name == "noise" else "noise does not dominate"
    axes.set_title(
        f"digits, Adam, batch {arm['batch']}: {which}\n"
        f"(noise scale {low:.0f} to {high:.0f} samples)",
        fontsize="medium",
    )
    axes.set_xlabel("steps / l²")
    axes.set_ylabel("loss of all images, nats")
    title = f"mean of {len(settings['seeds'])} seeds, band: standard deviation"
    axes.legend(fontsize="small", title=title, title_fontsize="small")
