"""RMSprop with the standard deviation against the variance below the gradient: what units lr has.

McAllester (TTIC 31230, "RMSProp and Adam") writes the update as lr g / sigma (1) or lr g / sigma^2
(2). A parameter w in units of weight and a loss in units of loss leave (1) with an lr in units of
weight, and (2) with one in units of loss: g / sigma^2 is weight / loss. (The lecture says inverse
loss; the arms "lr k" and "lr / k" below decide.) So the numerical value of lr follows the unit of
the weights in (1) alone, and the unit of the loss in (2) alone.

To see it, the digits network is trained with c times its weights for parameters, and with k times
its loss. Neither changes the function that is learnt. eps follows its own unit, that of the
denominator, unless it is negligible. What is compared is the loss in its original unit, against
c = k = 1.

In practice (1) does better: with a small eps, (2) makes steps in inverse proportion to gradients,
the longest for the weights that the data hardly tell anything about. With an eps above the
variances of most weights, (2) is near to SGD with lr / eps, and here nearly as good as (1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.progress import Progress
from torch import Tensor, nn
from torch.func import functional_call

import fusedopt

from .arms import backend, distance
from .digits_task import Digits

TITLE = "Denominator: whose unit does RMSprop's lr have?"
FULL = {
    "seeds": [0, 1, 2],
    "batch": 32,
    "evaluations": 10,  # epochs
    "factors": [1 / 16, 0.3, 3.0, 16.0],
    "alpha": 0.99,
    "std": {"lr": 1e-3, "eps": 1e-8},
    "variance": {"lr": 3e-5, "eps": 1e-6},
    # Saturated gradients fall below 1e-20: nothing but their squares must count.
    "negligible": {"lr": 1e-6, "eps": 1e-200},
    # Of std; a hundredth of it for variance.
    "sweep": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1],
}
REDUCED = {"seeds": [0], "evaluations": 2, "factors": [1 / 16, 3.0], "sweep": [3e-3, 1e-2]}


@dataclass(frozen=True)
class Arm:
    """A form, a unit that changes, and whether lr follows it.

    Attributes:
        title: for plots.
        form: ``denominator`` of ``fusedopt.RMSprop``.
        unit: ``"weight"`` (c) or ``"loss"`` (k).
        lr_power: lr is multiplied by the factor to this power.
        invariant: whether the trajectory must stay the same.
        base: settings with lr and eps, the form's own unless named.
    """

    title: str
    form: str
    unit: str
    lr_power: int
    invariant: bool
    base: str = ""

    def hyper(self, settings: dict[str, Any], factor: float) -> dict[str, float]:
        """Return lr and eps for a factor; a gradient is multiplied by k / c."""
        hyper: dict[str, float] = dict(settings[self.base or self.form])
        hyper["lr"] *= factor**self.lr_power
        if self.base != "negligible":
            gradient = factor if self.unit == "loss" else 1 / factor
            hyper["eps"] *= gradient if self.form == "std" else gradient**2
        return hyper


ARMS = {
    "std": Arm("std: weights c, same lr", "std", "weight", 0, False),
    "std_lr": Arm("std: weights c, lr c", "std", "weight", 1, True),
    "variance": Arm("variance: weights c, same lr", "variance", "weight", 0, True),
    "variance_eps": Arm(
        "variance: weights c, same lr, no eps", "variance", "weight", 0, True, "negligible"
    ),
    "std_loss": Arm("std: loss k, same lr", "std", "loss", 0, True),
    "variance_loss": Arm("variance: loss k, same lr", "variance", "loss", 0, False),
    "variance_loss_lr": Arm("variance: loss k, lr k", "variance", "loss", 1, True),
    "variance_loss_inverse": Arm("variance: loss k, lr / k", "variance", "loss", -1, False),
}
# What is tuned: the form, eps, and what its lr is of the sweep's.
TUNED = {
    "std, eps = 1e-8": ("std", 1e-8, 1.0),
    "variance, eps = 1e-8": ("variance", 1e-8, 1e-2),
    "variance, eps = 1e-4": ("variance", 1e-4, 1e-2),
}


# From the largest factor on: light to dark.
COLORS = ("#fee8c8", "#fdbb84", "#ef6548", "#b30000", "#4a0000")


class Rescaled(nn.Module):
    """A network with ``factor`` times its weights for parameters."""

    def __init__(self, network: nn.Module, factor: float) -> None:
        super().__init__()
        self.network, self.factor = network, factor
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(factor)

    def forward(self, images: Tensor) -> Tensor:
        weights = {name: p / self.factor for name, p in self.network.named_parameters()}
        return functional_call(self.network, weights, (images,))


def run(settings: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Train every arm in every unit, and both forms at every lr."""
    seeds, factors = settings["seeds"], settings["factors"]
    trainings = len(ARMS) * (len(factors) + 1) + len(TUNED) * len(settings["sweep"])
    bar = progress.add_task("", total=trainings * len(seeds))

    def losses(form: str, hyper: dict[str, float], c: float = 1.0, k: float = 1.0) -> list[Any]:
        found = [_train(settings, seed, form, hyper, c, k) for seed in seeds]
        progress.advance(bar, len(seeds))
        return found

    return {
        "arms": {name: _rescale(settings, arm, losses) for name, arm in ARMS.items()},
        "tuned": {name: _tune(settings, tuned, losses) for name, tuned in TUNED.items()},
    }


def _rescale(
    settings: dict[str, Any], arm: Arm, losses: Callable[..., list[list[float]]]
) -> dict[str, Any]:
    curves = {}
    for factor in (1.0, *settings["factors"]):
        units = {"c" if arm.unit == "weight" else "k": factor}
        curves[factor] = losses(arm.form, arm.hyper(settings, factor), **units)
    gaps = {
        factor: [distance(*pair) for pair in zip(curves[factor], curves[1.0], strict=True)]
        for factor in settings["factors"]
    }
    return {"title": arm.title, "losses": curves, "M1": gaps}


def _tune(
    settings: dict[str, Any],
    tuned: tuple[str, float, float],
    losses: Callable[..., list[list[float]]],
) -> dict[float, list[float]]:
    """Return the last losses of all seeds for each lr."""
    form, eps, ratio = tuned
    # As it is written: 3e-06, for the names in the JSON.
    rates = [float(f"{lr * ratio:g}") for lr in settings["sweep"]]
    return {lr: [curve[-1] for curve in losses(form, {"lr": lr, "eps": eps})] for lr in rates}


def _train(
    settings: dict[str, Any], seed: int, form: str, hyper: dict[str, float], c: float, k: float
) -> list[float]:
    """Train on c times the weights and k times the loss; return the losses after each epoch."""
    task = Digits(settings["evaluations"], seed, settings["device"])
    model = Rescaled(task.model(), c)
    optimizer = fusedopt.RMSprop(
        model.parameters(),
        **hyper,
        alpha=settings["alpha"],
        denominator=form,
        backend=backend(task.images.device),
    )
    losses = []
    for count, samples in enumerate(task.order.split(settings["batch"]), 1):
        optimizer.zero_grad()
        (k * task.loss(model, samples)).backward()
        optimizer.step()
        if count * settings["batch"] % task.interval == 0:
            losses.append(task.evaluate(model))
    return losses


def claims(result: dict[str, Any]) -> list[tuple[str, float, float, bool]]:
    """Return what the figures must show, at the worst factor, in the seed that shows it least."""
    figures = result["figures"]
    stated = []
    for name, arm in ARMS.items():
        worst = [max(gaps) for gaps in zip(*figures["arms"][name]["M1"].values(), strict=True)]
        if arm.invariant:
            value = max(worst)
            stated.append((f"M1 of {arm.title}, at most", value, 1e-9, value <= 1e-9))
        else:
            value = min(worst)
            stated.append((f"M1 of {arm.title}, at least", value, 0.1, value >= 0.1))
    one, two, _ = (min(map(fmean, tuned.values())) for tuned in figures["tuned"].values())
    text = "loss at the best lr with eps = 1e-8, variance over std, above"
    return [*stated, (text, two / one, 1.0, two / one > 1.0)]


def draw(result: dict[str, Any]) -> Figure:
    """Plot the losses for each unit of the weights, M1 as bars, and the losses over lr."""
    settings, found = result["settings"], result["figures"]
    figure = Figure(figsize=(13.5, 9), layout="constrained")
    figure.suptitle(
        f"RMSprop on digits, MLP 64-64-10, batch {settings['batch']}: std, lr g / (sqrt(s) + eps),"
        " and variance, lr g / (s + eps); parameters are c times the weights"
    )
    (one, two), (bars, tuned) = figure.subplots(2, 2)
    two.sharey(one)
    for axes, name in ((one, "std"), (two, "variance")):
        _draw_losses(axes, found["arms"][name])
        axes.set_title(f"{name}, lr = {settings[name]['lr']:g} for every c (a line a seed)")
    one.legend(fontsize="small")
    _draw_bars(bars, found["arms"], settings)
    _draw_tuned(tuned, found["tuned"])
    return figure


def _draw_losses(axes: Axes, entry: dict[str, Any]) -> None:
    factors = sorted(entry["losses"], reverse=True)
    for i, factor in enumerate(factors):
        # Curves that coincide would hide each other.
        style = {"color": COLORS[i], "lw": 1.2 + 1.7 * (len(factors) - 1 - i)}
        for j, losses in enumerate(entry["losses"][factor]):
            label = f"c = {factor:.3g}" if j == 0 else None
            axes.plot(range(1, len(losses) + 1), losses, label=label, **style)
    axes.set(yscale="log", xlabel="epoch", ylabel="training loss, nats")
    axes.grid(alpha=0.3, which="both")


def _draw_bars(axes: Axes, arms: dict[str, Any], settings: dict[str, Any]) -> None:
    worst = [
        [max(gaps) for gaps in zip(*entry["M1"].values(), strict=True)] for entry in arms.values()
    ]
    colors = ["#9ecae1" if arm.invariant else "#b30000" for arm in ARMS.values()]
    places = range(len(worst))
    axes.barh(places, [fmean(values) for values in worst], color=colors)
    for place, values in zip(places, worst, strict=True):
        axes.plot(values, [place] * len(values), "k.", ms=4)
        label = f"  {fmean(values):.1g}"
        axes.annotate(label, (max(*values, 1e-17), place), va="center", fontsize="small")
    axes.set_yticks(places, [entry["title"] for entry in arms.values()])
    axes.invert_yaxis()
    axes.set(xscale="log", xlim=(1e-17, 300))
    factors = ", ".join(f"{factor:.3g}" for factor in settings["factors"])
    axes.set_xlabel(f"M1 against c = k = 1, at the worst of c, k = {factors}")
    axes.set_title("blue must stay, red must change (bars: mean; dots: seeds)")
    axes.grid(alpha=0.3, axis="x")


def _draw_tuned(axes: Axes, tuned: dict[str, dict[float, list[float]]]) -> None:
    for (title, losses), color in zip(
        tuned.items(), ("#08519c", "#b30000", "#fdae6b"), strict=True
    ):
        _draw_mean(axes, list(losses), list(losses.values()), color, title)
    axes.set(xscale="log", yscale="log", xlabel="lr (std: unit of the weights; variance: nats)")
    axes.set_ylabel("training loss after the last epoch, nats")
    axes.set_title("which does better? (lines: mean of seeds; dots: seeds)")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")


def _draw_mean(
    axes: Axes, x: Sequence[float], y: Sequence[Sequence[float]], color: str, label: str
) -> None:
    axes.plot(x, [math.exp(fmean(map(math.log, row))) for row in y], color=color, label=label)
    for value, row in zip(x, y, strict=True):
        axes.plot([value] * len(row), row, ".", color=color, ms=5)
