"""The picture of a result: times over the plain gradient's, and memory, by length of sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.harness.figures import heading

from .aims import LONG, LONG_FROM, ROW
from .contenders import CONTENDERS, OURS

Case = dict[str, Any]


def draw(result: dict[str, Any]) -> Figure:
    """Draw a column of two plots for each type of arithmetic."""
    kinds = sorted({case["arithmetic"] for case in result["linear"]}) or [""]
    figure = Figure(figsize=(1 + 5 * len(kinds), 9), layout="constrained")
    axes = figure.subplots(2, len(kinds), squeeze=False, sharex=True, sharey="row")
    for column, kind in enumerate(kinds):
        cases = [case for case in result["linear"] if case["arithmetic"] == kind]
        times, memory = axes[0][column], axes[1][column]
        times.set_title(kind)
        _curves(times, cases, lambda entry: entry.get("ratio"))
        _curves(memory, cases, lambda entry: _mebibytes(entry.get("peak_bytes")))
        _aims(times, cases)
        memory.set_xlabel("rows of a sample, T")
    axes[0][0].set_ylabel("time over the plain gradient's")
    axes[1][0].set_ylabel("peak memory over the operands, MiB")
    handles, labels = axes[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
    what = "Gradient and per-sample squares of a linear layer"
    figure.suptitle(heading(f"{what}, {result['environment']['device']}", result, "shapes"))
    return figure


def _mebibytes(count: int | None) -> float | None:
    return None if count is None else count / 2**20


def _curves(axes: Axes, cases: list[Case], value: Callable[[Case], float | None]) -> None:
    """Draw each contender: a line through the lengths at one weight, and points elsewhere."""
    weights = Counter((case["inputs"], case["outputs"]) for case in cases)
    line = weights.most_common(1)[0][0] if weights else None
    for number, (name, contender) in enumerate(CONTENDERS.items()):
        on_line, off_line = [], []
        for case in cases:
            found = value(case["contenders"].get(name, {}))
            # Zero has no place on a logarithmic axis.
            if found:
                here = (case["inputs"], case["outputs"]) == line
                (on_line if here else off_line).append((case["length"], found))
        style: dict[str, Any] = {"color": f"C{number}", "linewidth": 2.5 if name == OURS else 1.2}
        axes.plot(*_columns(on_line), marker="o", label=contender.title, **style)
        axes.plot(*_columns(off_line), marker="x", linestyle="", **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.grid(alpha=0.3)


def _columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    points = sorted(points)
    return [x for x, _ in points], [y for _, y in points]


def _aims(axes: Axes, cases: list[Case]) -> None:
    longest = max((case["length"] for case in cases), default=1)
    style: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1}
    axes.plot([0.7, 1.4], [ROW, ROW], label=f"aims for {CONTENDERS[OURS].title}", **style)
    if longest >= LONG_FROM:
        axes.plot([LONG_FROM, longest], [LONG, LONG], **style)
