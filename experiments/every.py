"""Squares at every k-th step alone: is the training still that of the small batch?

``PerSampleSquares(model, every=k)`` on the digits and the character GPT, for k = 1, 4 and 16 and
virtual batches of 8 and of 1. M1 is against the training of k = 1 at the base batch, which with a
virtual batch of 8 is AdamW. The cost is stated as the share of backward passes that make squares;
what these take on a GPU is for ``bench.per_sample`` to say, and the others are torch's own.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.progress import Progress
from torch import Tensor

import fusedopt

from . import char_gpt, digits
from .arms import Arm, Task, backend, distance, train
from .digits_task import Digits

TITLE = "Squares at every k-th step: does the training still not depend on the batch size?"
FULL: dict[str, Any] = {
    "every": [1, 4, 16],
    "virtual": [8, 1],
    "digits": {**digits.FULL, "seeds": [0, 1, 2]},
    "gpt": {**char_gpt.FULL, "seeds": [0, 1]},
}
REDUCED: dict[str, Any] = {
    "every": [1, 4],
    "digits": {**FULL["digits"], **digits.REDUCED},
    "gpt": {**FULL["gpt"], **char_gpt.REDUCED, "seeds": [0]},
}
_NAMES = {"digits": "digits", "gpt": "character GPT"}
_COLORS = {1: "#08519c", 4: "#41ab5d", 16: "#ef6548"}


def _task(name: str, settings: dict[str, Any], seed: int) -> Task:
    if name == "digits":
        return Digits(settings["evaluations"], seed, settings["device"])
    return char_gpt.Windows(settings, seed)


def run(settings: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Train with every k, virtual batch, batch size and seed, and by the square-root rule."""
    found = {}
    for name in _NAMES:
        own = {**settings[name], "device": settings["device"]}
        runs = len(settings["every"]) * len(settings["virtual"]) + 1
        total = runs * len(own["seeds"]) * len(own["batches"]) * own["evaluations"]
        bar = progress.add_task(name, total=total)
        trainings = [_train_all(name, settings, own, seed, progress, bar) for seed in own["seeds"]]
        found[name] = _together(trainings)
    return found


def _train_all(
    name: str,
    settings: dict[str, Any],
    own: dict[str, Any],
    seed: int,
    progress: Progress,
    bar: Any,
) -> dict[str, Any]:
    """Return what one seed gives: for each arm and batch, losses, M1 and the share of squares."""
    task, base = _task(name, own, seed), own["batches"][0]
    found: dict[str, Any] = {}

    def advance() -> None:
        progress.advance(bar)

    rule = Arm("Adam, square-root rule", "sqrt")
    losses = {}
    for batch in own["batches"]:
        hyper = rule.hyper(own["hyper"], base, batch)
        losses[batch] = train(task, rule, hyper, base, batch, advance).losses
    found["sqrt"] = {"M1": {b: distance(x, losses[base]) for b, x in losses.items()}}
    for b in settings["virtual"]:
        reference: list[float] = []
        for every in settings["every"]:
            arm: dict[str, Any] = {"M1": {}, "share": {}, "losses": {}}
            for batch in own["batches"]:
                losses_of, share = _train(task, own["hyper"], base, batch, b, every, advance)
                reference = reference or losses_of
                arm["M1"][batch] = distance(losses_of, reference)
                arm["share"][batch] = share
                arm["losses"][batch] = losses_of
            found[f"virtual {b}, every {every}"] = arm
    return found


def _train(
    task: Task,
    hyper: dict[str, Any],
    base: int,
    batch: int,
    b: int,
    every: int,
    advance: Any,
) -> tuple[list[float], float]:
    """Train a new model; return its losses, and the share of steps that made squares."""
    model = task.model()
    chosen = backend(next(model.parameters()).device)
    statistics = fusedopt.PerSampleSquares(model, every=every, backend=chosen)
    optimizer = fusedopt.BatchDecoupledAdam(
        model.parameters(),
        **fusedopt.scaling.rescale(hyper, base, batch, "decoupled"),
        statistics=statistics,
        virtual_batch_size=b,
        backend=chosen,
    )
    losses, steps, measured = [], 0, 0

    def step(samples: Tensor) -> None:
        optimizer.zero_grad()
        task.loss(model, samples).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    for samples in task.order.split(batch):
        step(samples)
        steps, measured = steps + 1, measured + statistics.measured
        if steps * batch % task.interval == 0:
            losses.append(task.evaluate(model))
            advance()
    return losses, measured / steps


def _together(trainings: list[dict[str, Any]]) -> dict[str, Any]:
    """Make of the seeds' figures lists of them, where they differ from seed to seed."""
    found: dict[str, Any] = {}
    for name, arm in trainings[0].items():
        found[name] = {
            key: {b: [t[name][key][b] for t in trainings] for b in values}
            for key, values in arm.items()
            if key != "share"
        }
        if "share" in arm:
            found[name]["share"] = arm["share"]
    return found


def claims(result: dict[str, Any]) -> list[tuple[str, float, float, bool]]:
    """Return what the figures must show."""
    settings, stated = result["settings"], []
    for name, title in _NAMES.items():
        found, batches = result["figures"][name], settings[name]["batches"]
        base, last = batches[0], batches[-1]
        daily = found[f"virtual {base}, every 1"]["M1"][last]
        for every in settings["every"][1:]:
            gaps = found[f"virtual {base}, every {every}"]["M1"]
            text = f"{title}: M1 at batch {base} with a virtual batch of it, k = {every}"
            stated.append((text, max(gaps[base]), 0.0, max(gaps[base]) == 0.0))
            ratio = fmean(gaps[last]) / fmean(daily)
            text = f"{title}, batch {last}: M1 of k = {every} over that of k = 1, at most"
            stated.append((text, ratio, 2.0, ratio <= 2.0))
    found, last = result["figures"]["digits"], settings["digits"]["batches"][-1]
    for b in settings["virtual"]:
        for every in settings["every"]:
            gaps = zip(
                found["sqrt"]["M1"][last], found[f"virtual {b}, every {every}"]["M1"][last],
                strict=True,
            )  # fmt: skip
            ratio = min(other / own for other, own in gaps)
            text = (
                f"digits, batch {last}: the square-root rule's M1 over that of a virtual batch of"
                f" {b}, k = {every}, in the worst seed, above"
            )
            stated.append((text, ratio, 3.0, ratio > 3.0))
    return stated


def draw(result: dict[str, Any]) -> Figure:
    """Plot M1 against the batch size, a panel for each task and virtual batch."""
    settings = result["settings"]
    figure = Figure(figsize=(14, 4.8), layout="constrained")
    figure.suptitle(
        "Per-sample squares at every k-th step: M1, the RMS over time of the log of the loss over"
        " that of k = 1 at the smallest batch"
    )
    panels = figure.subplots(1, len(_NAMES) * len(settings["virtual"]))
    places = [(name, b) for name in _NAMES for b in settings["virtual"]]
    for axes, (name, b) in zip(panels, places, strict=True):
        _draw_task(axes, result, name, b)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _draw_task(axes: Axes, result: dict[str, Any], name: str, b: int) -> None:
    settings, found = result["settings"], result["figures"][name]
    batches = settings[name]["batches"]
    arms = [("square-root rule", "#9e9e9e", found["sqrt"])]
    for every in settings["every"]:
        arm = found[f"virtual {b}, every {every}"]
        share = 100 * arm["share"][batches[0]]
        label = f"k = {every}: squares in {share:.3g} % of backward passes"
        arms.append((label, _COLORS[every], arm))
    for label, color, arm in arms:
        # What is 0 has no place on this axis.
        shown = [batch for batch in batches if max(arm["M1"][batch]) > 0]
        means = [fmean(arm["M1"][batch]) for batch in shown]
        axes.plot(shown, means, "-", color=color, label=label)
        for batch in shown:
            values = arm["M1"][batch]
            axes.plot([batch] * len(values), values, "o", color=color, ms=4, mew=0)
    axes.set(xscale="log", yscale="log", xlabel="batch size", xticks=batches)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    seeds = len(settings[name]["seeds"])
    axes.set_title(f"{_NAMES[name]}, virtual batch {b} ({seeds} seeds)", fontsize="medium")
