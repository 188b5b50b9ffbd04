"""SVAG and the SDEs of SGD, RMSprop and Adam: on a noisy quadratic, and Adam's SVAG on the digits.

On the quadratic, both the rule for the batch size and SVAG make steps finer at one SDE. To first
order, means must approach the SDE's in proportion to the time of a step. That is measured where
noise dominates the gradient; from a start far away, where it does not, the SDE is off by more
than it predicts. The noise is normal, so that SVAG's mix of two gradients has exactly the
distribution of one gradient with more noise: what differs is arithmetic.

The digits have no SDE to compare with, but l = 2 and 4 must do as l = 1 where noise dominates.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from matplotlib.figure import Figure
from rich.progress import Progress

from . import svag_digits, svag_plots
from .weak_error import measure, setting_of, summary

TITLE = "SVAG: do SGD, RMSprop and Adam follow their SDEs?"
FULL: dict[str, Any] = {
    "seed": 0,
    "chunks": 8,
    "replicas": 6000,  # of a chunk
    "curvatures": [0.5, 1.0, 1.5, 2.0],
    "steps": 50,  # of the base
    "every": 5,
    "finest": 32,  # steps of the SDE's solution for one of the base
    "warm_steps": 10,
    "start": 1.0,  # of every coordinate
    "optimizers": {
        "SGD": {"hyper": {"lr": 0.1}, "sigma": 2.0},
        "RMSprop": {
            "hyper": {"lr": 0.2, "alpha": 0.96, "eps": 1.0},
            "sigma": 4.0,
            "start_u": 2.0,
        },
        "Adam": {"hyper": {"lr": 0.2, "betas": (0.9, 0.96), "eps": 1.0}, "sigma": 4.0},
    },
    "refinements": [1, 2, 4, 8, 16],
    "ells": [2, 4],
    "slope_within": 0.1,
    "far": {"start": 20.0, "chunks": 4, "kinds": ["RMSprop", "Adam"]},
    "digits": {
        "seeds": [0, 1, 2, 3, 4],
        "evaluations": 10,
        "hyper": {"lr": 2e-3, "betas": (0.9, 0.99), "eps": 1e-2},
        "arms": {
            "noise": {"batch": 1, "steps": 300, "ells": [1, 2, 4]},
            "signal": {"batch": 64, "steps": 100, "ells": [1, 2]},
        },
    },
}
REDUCED: dict[str, Any] = {
    "chunks": 3,
    "replicas": 1500,
    "steps": 20,
    "finest": 16,
    "refinements": [1, 2, 4],
    "slope_within": 0.2,
    "far": {"start": 20.0, "chunks": 3, "kinds": ["RMSprop"]},
    "digits": {
        **FULL["digits"],
        "seeds": [0, 1, 2, 3],
        "arms": {
            "noise": {"batch": 1, "steps": 80, "ells": [1, 2]},
            "signal": {"batch": 64, "steps": 60, "ells": [1, 2]},
        },
    },
}


def run(settings: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Simulate on the quadratic from near and from far, and train on the digits."""
    kinds, far, digits = settings["optimizers"], settings["far"], settings["digits"]
    trainings = len(digits["seeds"]) * sum(len(arm["ells"]) for arm in digits["arms"].values())
    total = len(kinds) * settings["chunks"] + len(far["kinds"]) * far["chunks"] + trainings
    bar = progress.add_task("", total=total)

    def at(kind: str, start: float, refinements: Iterable[int], chunks: int) -> dict[str, Any]:
        setting = setting_of(settings, kind, start)
        found = measure(
            settings,
            setting,
            refinements,
            settings["ells"],
            chunks,
            lambda: progress.advance(bar),
        )
        return summary(setting, found, settings)

    near = {k: at(k, settings["start"], settings["refinements"], settings["chunks"]) for k in kinds}
    away = {k: at(k, far["start"], [1], far["chunks"]) for k in far["kinds"]}
    shared = {**digits, "device": settings["device"]}
    trained = {
        name: svag_digits.compare(shared, arm, lambda: progress.advance(bar))
        for name, arm in digits["arms"].items()
    }
    return {"near": near, "far": away, "digits": trained}


def claims(result: dict[str, Any]) -> list[tuple[str, float, float, bool]]:
    """Return what the figures must show, in the worst test function and the worst seed."""
    settings, found = result["settings"], result["figures"]
    stated: list[tuple[str, float, float, bool]] = []

    def at_most(text: str, measured: float, bound: float) -> None:
        stated.append((f"{text}, at most", measured, bound, measured <= bound))

    for kind, entry in found["near"].items():
        off = max(abs(slope - 1) for slope, _ in entry["slope"].values())
        text = f"{kind}: slope of log weak error against log step, off 1 by"
        at_most(text, off, settings["slope_within"])
        at_most(f"{kind}: SVAG's weak error times steps, over l = 1's", _amplified(entry), 1.2)
    at_most("error of the SDE's solution over the smallest weak error", _solver(found), 0.1)
    ratio = min(_signal(found, kind, settings) for kind in found["far"])
    text = "relative weak error of l = 1 where the signal dominates, over that where noise does"
    stated.append((f"{text}, at least", ratio, 5.0, ratio >= 5.0))
    noise, signal = (found["digits"][name] for name in ("noise", "signal"))
    distance = max(noise["distance"].values()) / noise["spread"]
    at_most("digits: distance of l > 1 from l = 1 over the seeds' spread", distance, 1.0)
    ratio = signal["distance"][2] / signal["spread"]
    text = "digits: the same at a batch that noise does not dominate"
    stated.append((f"{text}, at least", ratio, 3.0, ratio >= 3.0))
    return stated


def _amplified(entry: dict[str, Any]) -> float:
    """Return SVAG's weak error over what first order makes of that of l = 1, at worst."""
    step = entry["step"]
    return max(
        errors[name][0] / errors["1"][0] * step["1"] / step[name]
        for errors in entry["weak_error"].values()
        for name in errors
        if name.startswith("SVAG")
    )


def _solver(found: dict[str, Any]) -> float:
    return max(
        entry["solver_error"][function] / min(error for error, _ in errors.values())
        for entry in found["near"].values()
        for function, errors in entry["weak_error"].items()
    )


def _signal(found: dict[str, Any], kind: str, settings: dict[str, Any]) -> float:
    """Return the loss's error from far over that from near, each over the loss at the start."""
    relative = [
        found[where][kind]["weak_error"]["loss"]["1"][0]
        / found[where][kind]["curves"]["loss"]["SDE"]["mean"][0]
        for where in ("far", "near")
    ]
    return relative[0] / relative[1]


def draw(result: dict[str, Any]) -> Figure:
    """Plot curves, differences from the SDE, weak errors, the far start and the digits."""
    return svag_plots.draw(result)
