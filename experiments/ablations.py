"""What else must follow the batch size, and how: eps, weight decay and betas, one at a time.

Each variant is virtual batch 8 with the decoupled rule but for one thing, at batch 512 (and those
between) against batch 8. So that it matters, eps or the decay is large where it is what varies.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.progress import Progress

from .arms import Arm, distance, train
from .digits_task import Digits

TITLE = "Ablations: eps, weight decay, betas"


def _arm(title: str, **changes: Any) -> Arm:
    return Arm(title, "decoupled", "sample", virtual_batch_size=8, **changes)


# What varies: hyper-parameters of its base, then the variants, the right one first.
STUDIES: dict[str, tuple[dict[str, Any], tuple[Arm, ...]]] = {
    "eps = 0.01": (
        {"eps": 1e-2},
        (
            _arm("eps"),
            _arm("eps / sqrt(kappa)", eps_power=-0.5),
            _arm("eps kappa", eps_power=1.0),
        ),
    ),
    "weight decay = 0.5": (
        {"weight_decay": 0.5},
        (_arm("decay"), _arm("decay sqrt(kappa)", decay_power=0.5)),
    ),
    "betas = 0.99, 0.999": (
        {},
        (_arm("beta ** kappa"), _arm("1 - kappa (1 - beta)", beta_form="linear")),
    ),
    # Here the linear form ends at kappa = 10.
    "beta1 = 0.9": (
        {"betas": (0.9, 0.999)},
        (_arm("beta1 ** kappa"), _arm("beta1", beta1_fixed=True)),
    ),
}
FULL = {
    "seeds": [0, 1],
    "batches": [8, 32, 128, 512],
    "evaluations": 40,  # epochs
    "hyper": {"lr": 3e-4, "betas": (0.99, 0.999), "eps": 1e-8, "weight_decay": 0.0},
    "claimed": list(STUDIES),
}
REDUCED = {
    "seeds": [0],
    "batches": [8, 512],
    "evaluations": 6,
    # Twelve steps are too few to tell the forms of beta apart.
    "claimed": [name for name in STUDIES if name != "betas = 0.99, 0.999"],
}


def run(settings: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Train every variant at every batch size and seed."""
    variants = sum(len(arms) for _, arms in STUDIES.values())
    # A study's variants are one training at the base batch.
    trainings = len(STUDIES) + variants * (len(settings["batches"]) - 1)
    total = trainings * len(settings["seeds"]) * settings["evaluations"]
    bar = progress.add_task("", total=total)

    def losses(seed: int, arm: Arm, base: dict[str, Any], batch: int) -> list[float]:
        task = Digits(settings["evaluations"], seed, settings["device"])
        smallest = settings["batches"][0]
        hyper = arm.hyper(base, smallest, batch)
        return train(task, arm, hyper, smallest, batch, lambda: progress.advance(bar)).losses

    studies = {name: _study(settings, losses, *study) for name, study in STUDIES.items()}
    return {"studies": studies}


def _study(
    settings: dict[str, Any], losses: Any, changes: dict[str, Any], arms: tuple[Arm, ...]
) -> dict[str, Any]:
    base = {**settings["hyper"], **changes}
    smallest, *larger = settings["batches"]
    references = [losses(seed, arms[0], base, smallest) for seed in settings["seeds"]]
    found: dict[str, Any] = {}
    for arm in arms:
        final = {smallest: [reference[-1] for reference in references]}
        gaps: dict[int, list[float]] = {}
        for batch in larger:
            curves = [losses(seed, arm, base, batch) for seed in settings["seeds"]]
            final[batch] = [curve[-1] for curve in curves]
            gaps[batch] = [distance(*pair) for pair in zip(curves, references, strict=True)]
        found[arm.title] = {"M1": gaps, "final_loss": final}
    return {"hyper": base, "variants": found}


def claims(result: dict[str, Any]) -> list[tuple[str, float, float, bool]]:
    """Return what the figures must show: each study's first variant is the best, in every seed."""
    last = result["settings"]["batches"][-1]
    stated = []
    for name in result["settings"]["claimed"]:
        study = result["figures"]["studies"][name]
        right, *others = study["variants"]
        best = study["variants"][right]["M1"][last]
        for title in others:
            pairs = zip(study["variants"][title]["M1"][last], best, strict=True)
            ratio = min(theirs / ours for theirs, ours in pairs)
            stated.append((f"{name}: M1 of {title} over {right}'s, above", ratio, 1.0, ratio > 1.0))
    return stated


def draw(result: dict[str, Any]) -> Figure:
    """Plot M1 against kappa, a panel a study."""
    settings = result["settings"]
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    figure.suptitle(
        f"Digits, virtual batch 8, lr {settings['hyper']['lr']:g} at batch 8; seeds:"
        f" {len(settings['seeds'])}, lines: their mean"
    )
    panels = figure.subplots(1, len(STUDIES), sharey=True)
    for axes, (name, study) in zip(panels, result["figures"]["studies"].items(), strict=True):
        _draw_study(axes, study, settings["batches"][0])
        axes.set_title(name, fontsize="medium")
    panels[0].set_ylabel("M1 against batch 8")
    return figure


def _draw_study(axes: Axes, study: dict[str, Any], smallest: int) -> None:
    for (title, values), color in zip(
        study["variants"].items(), ("#b30000", "#757575", "#252525"), strict=False
    ):
        kappas = [batch / smallest for batch in values["M1"]]
        means = [fmean(gaps) for gaps in values["M1"].values()]
        axes.plot(kappas, means, "o-", color=color, ms=4, label=title)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("kappa")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
