"""The picture of the sharded part: host time of clipping and a step by the number of tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import OURS

Entry = dict[str, Any]
CALLS = {"first_us": "first call", "later_us": "later calls (median)"}


def sharded(rows: list[Entry], heading: Callable[[str], str]) -> Figure:
    """Draw a panel for the first call and one for later ones, a line a placement and contender."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    for axis, (key, title) in zip(figure.subplots(1, 2, sharey=True), CALLS.items(), strict=True):
        _panel(axis, rows, key)
        axis.set_title(title)
        axis.set_xlabel("parameters")
    figure.axes[0].set_ylabel("host time, milliseconds")
    figure.axes[0].legend()
    figure.suptitle(heading("Clipping and AdamW step over sharded parameters, host time alone"))
    return figure


def _panel(axis: Axes, rows: list[Entry], key: str) -> None:
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in rows:
        if row[key] is not None:
            line = lines.setdefault((row["contender"], row["placement"]), [])
            line.append((row["tensors"], 1e-3 * row[key] * row["tensors"]))
    placements = list(dict.fromkeys(placement for _, placement in lines))
    for (contender, placement), points in lines.items():
        ours = contender == OURS
        name = contender if ours else "clip_grad_norm_ + torch fused"
        axis.loglog(
            *zip(*points, strict=True),
            marker="o" if ours else "s",
            linestyle="-" if ours else "--",
            color=f"C{placements.index(placement)}",
            label=f"{name}, {placement}",
        )
    axis.grid(alpha=0.3)
