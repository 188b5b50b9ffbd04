"""What eight-bit codes of Adam's states do to the next update, and to trainings.

An error of a state matters as an error of the next update, m / (sqrt(v) + eps): it is compared with
that of float64 states, over all elements, as a normalised mean square error, once with a new
gradient and once with none, which is what the rows of an embedding see that no token hit.

- One-shot: states are coded once, after many steps of Adam. This is what codes are usually
  compared by.
- Closed loop: states are coded after every step, as an optimizer does. v moves by 0.1 % of itself
  in a step, which is less than half a code of any eight-bit code: rounded to nearest, a v that has
  to fall never does, unless its whole group's scale does. Rounding has to be unbiased over time.
- Trainings: the loss of AdamW with coded states against float32 states, same seed and batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean, stdev
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.progress import Progress
from torch import Tensor

from . import state_codes_figure
from .eight_bits import Pair
from .state_pairs import pairs
from .state_tasks import TASKS, synthetic, train

TITLE = "Codes of Adam's states in eight bits: the next update, and the loss"
_ADAM = {"betas": (0.9, 0.999), "lr": 2e-3}
FULL: dict[str, Any] = {
    "seeds": [0, 1, 2, 3, 4],
    "eps": 1e-8,
    "sources": {
        "once": {"rows": 1024, "noise": "student", "steps": 200, "closed": False},
        "student": {"rows": 256, "noise": "student", "steps": 200, "closed": True},
        "shift": {
            "rows": 64,
            "noise": "normal",
            "steps": 3000,
            "closed": True,
            "shift": 1500,
            "factor": 1 / 30,
        },
        "rest": {
            "rows": 64,
            "noise": "normal",
            "steps": 3000,
            "closed": True,
            "shift": 1500,
            "factor": 0.0,
            "still": True,
        },
        "digits": {"steps": 600, "batch": 32, "hyper": _ADAM, "closed": True},
        "gpt": {
            "steps": 600,
            "batch": 16,
            "held_out_windows": 256,
            "model": {"context": 32, "width": 32, "heads": 4, "layers": 2},
            "hyper": {"betas": (0.9, 0.99), "lr": 6e-3},
            "closed": True,
        },
        "embedding": {
            "steps": 600,
            "batch": 64,
            "tokens": 800,
            "width": 48,
            "classes": 10,
            "bag": 8,
            "held_out": 4096,
            "hyper": {"betas": (0.9, 0.999), "lr": 1e-2},
            "closed": True,
        },
    },
    # In the closed loop, and of these, in trainings.
    "closed": [
        "bfloat16",
        "softsign",
        "dynamic",
        "expanded",
        "e4m3",
        "minifloat",
        "bits",
        "bits, random v",
        "bits, random",
        "bits, dither v",
        "bits, dither",
        "minifloat, dither",
        "e4m3, dither",
        "e5m2, dither",
        "joint, dither",
    ],
    "trained": [
        "bfloat16",
        "softsign",
        "dynamic",
        "bits",
        "bits, random",
        "bits, dither",
        "e4m3, dither",
    ],
    "chosen": {"int8": "bits, dither", "fp8": "e4m3, dither"},
    "bounds": {
        "one_shot": 5e-4,
        "falls": {"int8": 0.05, "fp8": 0.1},
        # To nearest over dithered.
        "gain": 5.0,
        # The largest update over the exact one, coded once and in trainings.
        "largest": {"once": 1.1, "training": 1.2},
        # Above that of float32 states, mean of the seeds.
        "loss": 0.005,
    },
}
REDUCED: dict[str, Any] = {
    "seeds": [0],
    "sources": {
        "once": {**FULL["sources"]["once"], "rows": 512},
        "shift": {**FULL["sources"]["shift"], "rows": 16, "steps": 1500, "shift": 500},
        "rest": {**FULL["sources"]["rest"], "rows": 16, "steps": 1500, "shift": 500},
        "digits": {**FULL["sources"]["digits"], "steps": 40},
    },
    "closed": ["bits", "bits, dither v", "bits, dither", "e4m3, dither"],
    "trained": ["bits, dither", "e4m3, dither"],
    "bounds": {**FULL["bounds"], "one_shot": 6e-4, "loss": 0.03},
}


def run(settings: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Measure every pair on every source and seed.

    Returns:
        ``once`` and ``closed``, by source, pair and seed: errors of the next update as ``errors``
        has them. ``losses`` by task: of float32 states (``"float32"``) and of pairs, by seed.
    """
    sources, seeds = settings["sources"], settings["seeds"]
    tasks = [name for name in sources if name in TASKS]
    total = len(seeds) * (len(sources) + len(tasks) * len(settings["trained"]))
    bar = progress.add_task("", total=total)
    found: dict[str, Any] = {"once": {}, "closed": {}, "losses": {}}
    for name, source in sources.items():
        for seed in seeds:
            loss = _measure(found, name, settings, seed)
            progress.advance(bar)
            if loss is None:
                continue
            losses = found["losses"].setdefault(name, {})
            losses.setdefault("float32", []).append(loss)
            for pair in settings["trained"]:
                ends = (end for _, end in train(name, source, seed, pairs()[pair]))
                losses.setdefault(pair, []).extend(end for end in ends if end is not None)
                progress.advance(bar)
    found["titles"] = {name: pair.title for name, pair in pairs().items()}
    found["bytes"] = {name: pair.bytes for name, pair in pairs().items()}
    return found


def _measure(found: dict[str, Any], name: str, settings: dict[str, Any], seed: int) -> float | None:
    """Add the errors of all pairs on one seed; return the loss of a training."""
    source, eps = settings["sources"][name], settings["eps"]
    gradients: Iterator[tuple[Tensor, float | None]] = (
        train(name, source, seed) if name in TASKS else synthetic(source, seed)
    )
    betas = source.get("hyper", _ADAM)["betas"]
    exact, kept = _Moments(betas, torch.float64), {}
    if source["closed"]:
        new = pairs()
        kept = {key: _Moments(betas, torch.float32, new[key]) for key in settings["closed"]}
    loss = None
    for step, (gradient, end) in enumerate(gradients, 1):
        loss = end if end is not None else loss
        if step > source["steps"]:
            break
        for moments in (exact, *kept.values()):
            moments.add(gradient, step)
    for key, pair in pairs().items():
        once = pair(exact.m.float(), exact.v.float(), 1)
        entry = errors(exact, *once, gradient, betas, eps)
        found["once"].setdefault(name, {}).setdefault(key, []).append(entry)
    for key, moments in kept.items():
        entry = errors(exact, moments.m, moments.v, gradient, betas, eps)
        found["closed"].setdefault(name, {}).setdefault(key, []).append(entry)
    return loss


class _Moments:
    """Both moments of a sequence of gradients."""

    def __init__(
        self, betas: tuple[float, float], dtype: torch.dtype, pair: Pair | None = None
    ) -> None:
        self._betas, self._dtype, self._pair = betas, dtype, pair
        self.m = self.v = torch.zeros((), dtype=dtype)

    def add(self, gradient: Tensor, step: int) -> None:
        beta1, beta2 = self._betas
        g = gradient.to(self._dtype)
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * g * g
        if self._pair is not None:
            self.m, self.v = self._pair(self.m, self.v, step)


def errors(
    exact: Any, m: Tensor, v: Tensor, gradient: Tensor, betas: tuple[float, float], eps: float
) -> dict[str, float]:
    """Compare the next update with that of float64 states.

    Returns:
        ``new`` and ``zero``: normalised mean square errors with the gradient and with none;
        ``largest``: the largest update without a gradient over the exact one's; ``v_bias``: the
        mean of log2 of v over the exact one, where that is not 0.
    """

    def update(m: Tensor, v: Tensor, g: Tensor | float) -> Tensor:
        m = betas[0] * m + (1 - betas[0]) * g
        return m / ((betas[1] * v + (1 - betas[1]) * g * g).sqrt() + eps)

    found = {}
    for key, g in (("new", gradient.double()), ("zero", 0.0)):
        right, wrong = update(exact.m, exact.v, g), update(m.double(), v.double(), g)
        found[key] = ((wrong - right).square().sum() / right.square().sum()).item()
    found["largest"] = (wrong.abs().max() / right.abs().max()).item()
    ratio = v.double()[exact.v > 0] / exact.v[exact.v > 0]
    # A v that became 0 counts as one a million times too small.
    found["v_bias"] = ratio.clamp(min=1e-6).log2().mean().item()
    return found


def loss_changes(losses: dict[str, list[float]], pair: str) -> list[float]:
    """Return by how much each seed's loss is above that of float32 states, relatively."""
    return [a / b - 1 for a, b in zip(losses[pair], losses["float32"], strict=True)]


def standard_error(values: list[float]) -> float:
    """Return that of the mean; nan of one value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def claims(result: dict[str, Any]) -> list[tuple[str, float, float, bool]]:
    """Return what the figures must show, in the worst seed where it does not say mean.

    A largest update is stated over the exact one, without a gradient.
    """
    figures, bounds = result["figures"], result["settings"]["bounds"]
    once, closed = figures["once"], figures["closed"]
    chosen = result["settings"]["chosen"]
    stated = []

    def at_most(text: str, value: float, bound: float) -> None:
        stated.append((f"{text}, at most", value, bound, value <= bound))

    def worst(rows: list[dict[str, float]], *keys: str) -> float:
        return max(row[key] for row in rows for key in keys)

    def mean(source: str, pair: str) -> float:
        return fmean(row["new"] for row in closed[source][pair])

    at_most("one-shot error, bits", worst(once["once"]["bits"], "new", "zero"), bounds["one_shot"])
    peer = min(row["new"] for row in once["once"]["dynamic"])
    for code in ("bits", "e4m3"):
        ratio = worst(once["once"][code], "new") / peer
        at_most(f"one-shot error, {code} over dynamic map", ratio, 1.0)
    for source, nearest in (("shift", "bits"), ("rest", "bits, dither v")):
        gain = mean(source, nearest) / mean(source, chosen["int8"])
        text = f"{source}, error of {nearest} over {chosen['int8']}, means, at least"
        stated.append((text, gain, bounds["gain"], gain >= bounds["gain"]))
    for kind, pair in chosen.items():
        at_most(f"shift, {kind}: error, mean", mean("shift", pair), bounds["falls"][kind])
        largest = worst(once["once"][pair], "largest")
        at_most(f"one-shot, {kind}: largest update", largest, bounds["largest"]["once"])
        for task in figures["losses"]:
            largest = worst(closed[task][pair], "largest")
            at_most(f"{task}, {kind}: largest update", largest, bounds["largest"]["training"])
    for task, losses in figures["losses"].items():
        for kind, pair in chosen.items():
            change = fmean(loss_changes(losses, pair))
            at_most(f"{task}: loss of {kind} over float32's, less 1", change, bounds["loss"])
    return stated


def draw(result: dict[str, Any]) -> Figure:
    """Plot errors by pair and source, and changes of losses."""
    return state_codes_figure.draw(result)
