"""The pictures of a result: times over ours by case, and bandwidth against a copy."""

from __future__ import annotations

from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from bench.harness.figures import heading, save
from bench.harness.output import File

from . import OURS
from .contenders import CONTENDERS
from .sharded_figure import sharded

Entry = dict[str, Any]
COLOURS = {name: f"C{i}" for i, name in enumerate(CONTENDERS)}
# Bars beyond this many times ours are cut, with their number beside them.
LONGEST = 6.0


def write(result: Entry, file: File) -> None:
    """Write the pictures beside the JSON."""
    save(bars(result), file.path("-bars.png"))
    save(roofline(result), file.path("-roofline.png"))
    if result["sharded"]:
        note = "launch and collective are left out"
        heading = partial(_heading, {**result, "note": note})
        save(sharded(result["sharded"], heading), file.path("-sharded.png"))


def _heading(result: Entry, what: str) -> str:
    environment = result["environment"]
    cuda = f", CUDA {environment['cuda']}" if environment["cuda"] else ""
    text = f"{what}\n{environment['device']}, torch {environment['torch']}{cuda}"
    return heading(text, result, "tensors")


def _measured(result: Entry) -> list[Entry]:
    return [row for row in result["rows"] if row["status"] == "measured" and row["device_ms"]]


def _panels(rows: list[Entry]) -> dict[str, list[Entry]]:
    """Sort the rows into bars that belong together: rule and types, unclipped before clipped."""
    found: dict[str, list[Entry]] = {}
    for row in sorted(rows, key=lambda row: row["clip"]):
        if not row["scaler"] and row["ratio_to_ours"] is not None:
            name = f"{row['rule']} {row['types']}{', clipped' if row['clip'] else ''}"
            found.setdefault(name, []).append(row)
    # A panel of ours alone compares nothing.
    return {
        name: own for name, own in found.items() if any(row["contender"] != OURS for row in own)
    }


def _most_telling(panels: dict[str, list[Entry]], limit: int = 6) -> dict[str, list[Entry]]:
    """Keep the panels with the most cases: AdamW's, where everything was run."""
    order = sorted(panels, key=lambda name: -len({row["case"] for row in panels[name]}))
    return {name: panels[name] for name in order[:limit]}


def bars(result: Entry) -> Figure:
    """Draw a panel for each rule and mix of types: cases, and a bar for each contender."""
    panels = _most_telling(_panels(_measured(result)))
    columns = 2 if len(panels) > 1 else 1
    lines = -(-len(panels) // columns) or 1
    # In inches: of a line of panels, what its fuller one needs.
    names = list(panels)
    heights = [
        max(0.9 + 0.17 * len(panels[name]) for name in names[i : i + columns])
        for i in range(0, len(names), columns)
    ] or [2.0]
    figure = Figure(figsize=(7 * columns, 1.3 + sum(heights)), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, height_ratios=heights)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (name, rows) in zip(axes.flat, panels.items(), strict=False):
        axis.set_axis_on()
        _panel(axis, name, rows)
    if panels:
        shown = {row["contender"] for rows in panels.values() for row in rows}
        handles = [
            Patch(color=COLOURS[name], label=CONTENDERS[name].title)
            for name in CONTENDERS
            if name in shown
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)
    else:
        axes[0][0].text(0.5, 0.5, "nothing was compared", ha="center")
    figure.suptitle(_heading(result, "Time of an optimizer step over fusedopt's"), fontsize=10)
    return figure


def _panel(axes: Axes, title: str, rows: list[Entry]) -> None:
    """Draw bars of a case below each other, the case's name beside them."""
    longest = min(LONGEST, max(row["ratio_to_ours"] for row in rows))
    places, labels, place = [], [], 0.0
    for case in dict.fromkeys(row["case"] for row in rows):
        first = place
        for row in (row for row in rows if row["case"] == case):
            ratio = row["ratio_to_ours"]
            axes.barh(place, min(ratio, LONGEST), color=COLOURS[row["contender"]], height=0.9)
            text = f"{ratio:.2f}  ({row['device_ms']['median']:.3g} ms)"
            end = min(ratio, LONGEST) + 0.02 * longest
            # On white, where it stands on the line at 1.
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}
            axes.text(end, place, text, va="center", fontsize=7, bbox=box)
            place += 1
        places.append((first + place - 1) / 2)
        labels.append(case)
        place += 0.8
    axes.set_yticks(places, labels, fontsize=8)
    axes.set_ylim(place - 0.8, -0.8)
    axes.set_xlim(0, 1.35 * longest)
    axes.axvline(1.0, color="black", linewidth=0.8, zorder=0)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_title(title, fontsize=9, loc="left")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def roofline(result: Entry) -> Figure:
    """Draw GB/s of each contender against the bytes a parameter that it moves."""
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots()
    rows = [row for row in _measured(result) if not row["scaler"]]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    markers = dict(zip(cases, "osD^vPX", strict=False))
    for row in rows:
        axes.scatter(
            row["bytes_per_parameter"],
            row["gbps"],
            color=COLOURS[row["contender"]],
            marker=markers[row["case"]],
            s=48 if row["contender"] == OURS else 26,
            alpha=0.85,
            linewidths=0,
        )
    _legend(axes, rows, markers)
    if result["copy"] is not None:
        gbps = result["copy"]["gbps"]
        axes.axhline(gbps["median"], color="black", linewidth=1)
        axes.axhspan(gbps["p10"], gbps["p90"], color="black", alpha=0.12, linewidth=0)
        label = f"copy, {gbps['median']:.4g} GB/s"
        axes.annotate(
            label,
            (1, gbps["median"]),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            fontsize=8,
        )
    axes.set_xlabel("bytes a parameter that the contender's operations move (fewer is better)")
    axes.set_ylabel("GB/s of those bytes")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    figure.suptitle(_heading(result, "Bandwidth of optimizer steps"))
    return figure


def _legend(axes: Axes, rows: list[Entry], markers: dict[str, str]) -> None:
    for name in dict.fromkeys(row["contender"] for row in rows):
        axes.scatter([], [], color=COLOURS[name], label=CONTENDERS[name].title)
    for case, marker in markers.items():
        axes.scatter([], [], color="grey", marker=marker, label=case)
    if rows:
        axes.figure.legend(loc="outside right center", fontsize=8)
