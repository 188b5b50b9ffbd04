"""Batch-size invariance: every arm at every batch size, against itself at the base batch."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.progress import Progress

from .arms import Arm, Task, distance, train

ARMS = {
    "constant": Arm("Adam, nothing rescaled", "constant"),
    "linear": Arm("Adam, linear rule", "linear"),
    "sqrt": Arm("Adam, square-root rule", "sqrt"),
    "micro": Arm("micro-batches of {b}", "decoupled", "micro"),
    "virtual": Arm("virtual batch {b}", "decoupled", "sample", virtual_batch_size=0),
    "per_sample": Arm("virtual batch 1", "decoupled", "sample", virtual_batch_size=1),
}
# From the base batch on: light to dark.
_COLORS = ("#fdbb84", "#ef6548", "#b30000", "#4a0000")


def arms(base_batch: int) -> dict[str, Arm]:
    """Return the arms, with the base batch filled in."""
    made = {}
    for name, arm in ARMS.items():
        fields = {**vars(arm), "title": arm.title.format(b=base_batch)}
        fields["virtual_batch_size"] = arm.virtual_batch_size or base_batch
        made[name] = Arm(**fields)
    return made


def compare(
    settings: dict[str, Any], task_of: Callable[[int], Task], progress: Progress
) -> dict[str, Any]:
    """Train every arm at every batch size and seed.

    Args:
        settings: with ``seeds``, ``batches`` (the base first), ``hyper`` and ``evaluations``.
        task_of: makes the task of a seed.
        progress: shows how far it is.

    Returns:
        For each arm its title, ``losses[batch][seed index]`` and ``M1[batch][seed index]``.
    """
    batches, seeds = settings["batches"], settings["seeds"]
    chosen = arms(batches[0])
    total = len(chosen) * len(seeds) * len(batches) * settings["evaluations"]
    bar = progress.add_task("", total=total)
    found: dict[str, Any] = {
        name: {"title": arm.title, "losses": {b: [] for b in batches}, "M1": {}}
        for name, arm in chosen.items()
    }
    for seed in seeds:
        task = task_of(seed)
        # The rules for Adam are one and the same training at the base batch.
        done: dict[str, list[float]] = {}
        for name, arm in chosen.items():
            for batch in batches:
                hyper = arm.hyper(settings["hyper"], batches[0], batch)
                key = str((arm.squares, arm.virtual_batch_size, batch, hyper))
                if key in done:
                    progress.advance(bar, settings["evaluations"])
                else:
                    run = train(task, arm, hyper, batches[0], batch, lambda: progress.advance(bar))
                    done[key] = run.losses
                found[name]["losses"][batch].append(done[key])
    for entry in found.values():
        references = entry["losses"][batches[0]]
        for batch in batches[1:]:
            pairs = zip(entry["losses"][batch], references, strict=True)
            entry["M1"][batch] = [distance(*pair) for pair in pairs]
    return found


def worst(entry: dict[str, Any]) -> float:
    """Return the largest M1 over the seeds, at the largest batch."""
    return max(entry["M1"][max(entry["M1"])])


def draw(result: dict[str, Any], heading: str, x_label: str, x: list[float]) -> Figure:
    """Plot the losses of the first seed, a panel an arm, and M1 at the largest batch as bars."""
    settings, found = result["settings"], result["figures"]["arms"]
    figure = Figure(figsize=(14, 6.5), layout="constrained")
    figure.suptitle(heading)
    left, right = figure.subfigures(1, 2, width_ratios=(2, 1))
    panels = left.subplots(2, 3, sharex=True, sharey=True)
    for axes, entry in zip(panels.flat, found.values(), strict=True):
        _draw_losses(axes, entry, settings["batches"], x)
    left.supxlabel(x_label, fontsize="medium")
    left.supylabel("loss, nats", fontsize="medium")
    panels[0, 0].legend(title="batch", fontsize="small")
    _draw_bars(right.subplots(), found, settings["batches"])
    return figure


def _draw_losses(axes: Axes, entry: dict[str, Any], batches: list[int], x: list[float]) -> None:
    for i, batch in enumerate(batches):
        # The base lies wide and light below the others, or curves that coincide would hide it.
        style = {"linewidth": 5, "alpha": 0.9} if i == 0 else {"linewidth": 1.4}
        axes.plot(x, entry["losses"][batch][0], color=_COLORS[i], label=str(batch), **style)
    axes.set_yscale("log")
    axes.set_title(entry["title"], fontsize="medium")
    axes.grid(alpha=0.3, which="both")


def _draw_bars(axes: Axes, found: dict[str, Any], batches: list[int]) -> None:
    last = batches[-1]
    names = [entry["title"] for entry in found.values()]
    means = [fmean(entry["M1"][last]) for entry in found.values()]
    decoupled = [name in ("micro", "virtual", "per_sample") for name in found]
    colors = ["#b30000" if d else "#9e9e9e" for d in decoupled]
    axes.barh(names, means, color=colors)
    for row, (mean, entry) in enumerate(zip(means, found.values(), strict=True)):
        values = entry["M1"][last]
        axes.plot(values, [row] * len(values), "k.", ms=4)
        axes.text(max(values) * 1.25, row, f"{mean:.2g}", va="center")
    axes.set_xscale("log")
    axes.set_xlim(min(means) / 3, max(means) * 6)
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x")
    seeds = len(next(iter(found.values()))["M1"][last])
    note = f"mean, and each of {seeds} seeds" if seeds > 1 else "one seed"
    axes.set_title(
        f"batch {last} against batch {batches[0]}: M1, the RMS over\n"
        f"time of the log of the losses' ratio ({note})",
        fontsize="medium",
        loc="right",
    )
