"""Batch-size invariance on the digits: one order of samples, cut into batches of 8 to 512."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from rich.progress import Progress

from . import comparison
from .digits_task import Digits

TITLE = "Digits: does the training depend on the batch size?"
FULL = {
    "seeds": [0, 1, 2],
    "batches": [8, 32, 128, 512],
    "evaluations": 40,  # epochs
    "hyper": {"lr": 1e-4, "betas": (0.99, 0.999), "eps": 1e-8, "weight_decay": 0.0},
}
REDUCED = {"seeds": [0], "batches": [8, 128], "evaluations": 4}


def run(settings: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Train every arm at every batch size."""

    def task(seed: int) -> Digits:
        return Digits(settings["evaluations"], seed, settings["device"])

    return {"arms": comparison.compare(settings, task, progress)}


def claims(result: dict[str, Any]) -> list[tuple[str, float, float, bool]]:
    """Return what the figures must show, in the worst seed."""
    found = result["figures"]["arms"]
    ours = {name: comparison.worst(found[name]) for name in ("micro", "virtual", "per_sample")}
    theirs = {name: comparison.worst(found[name]) for name in ("constant", "linear", "sqrt")}
    stated = [
        (f"M1 of {found[name]['title']} is at most", value, 0.01, value <= 0.01)
        for name, value in ours.items()
    ]
    ratio = min(theirs.values()) / ours["virtual"]
    title = found["virtual"]["title"]
    return [*stated, (f"the best rule's M1 over {title}'s is at least", ratio, 20.0, ratio >= 20.0)]


def draw(result: dict[str, Any]) -> Figure:
    """Plot the losses and M1."""
    settings = result["settings"]
    heading = (
        f"Digits, MLP 64-64-10, float64, lr {settings['hyper']['lr']:g} at batch"
        f" {settings['batches'][0]}: the same samples in the same order"
    )
    epochs = [float(i) for i in range(1, settings["evaluations"] + 1)]
    return comparison.draw(result, heading, "epoch", epochs)
