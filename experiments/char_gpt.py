"""Batch-size invariance on the demo's character GPT: the digits comparison on a transformer."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure
from rich.progress import Progress
from torch import Tensor

from fusedopt.examples import char_gpt

from . import comparison

TITLE = "Character GPT: does the training depend on the batch size?"
FULL = {
    "seeds": [0],
    "batches": [8, 32, 128],
    "windows": 16384,
    "evaluations": 32,
    "held_out_windows": 256,
    "model": {"context": 32, "width": 32, "heads": 4, "layers": 2},
    "hyper": {"lr": 1e-3, "betas": (0.99, 0.999), "eps": 1e-8, "weight_decay": 0.0},
}
REDUCED = {
    "batches": [8, 64],
    "windows": 1024,
    "evaluations": 4,
    "held_out_windows": 32,
    "model": {"context": 16, "width": 16, "heads": 2, "layers": 1},
    # So few steps are all warm-up of the averages, where only a small lr comes near invariance.
    "hyper": {**FULL["hyper"], "lr": 3e-4},
}


class Windows:
    """Windows of the Python language reference, drawn from the seed; a window is a sample.

    The loss is that of a fixed set of held-out windows, in nats per character.
    """

    def __init__(self, settings: dict[str, Any], seed: int) -> None:
        self.settings = settings
        self.seed = seed
        context = settings["model"]["context"]
        self.vocabulary, codes, held_out = char_gpt.encode(char_gpt.read_text(), context)
        count = settings["windows"]
        self.samples = next(char_gpt.windows(codes, context, count, seed)).to(settings["device"])
        drawn = char_gpt.windows(held_out, context, settings["held_out_windows"], seed=0)
        self.held_out = next(drawn)
        self.order = torch.arange(count, device=settings["device"])
        self.interval = count // settings["evaluations"]

    def model(self) -> char_gpt.CharGPT:
        """Return the GPT as the demo initialises it."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model = char_gpt.CharGPT(len(self.vocabulary), **self.settings["model"])
        return model.to(self.settings["device"])

    def loss(self, model: char_gpt.CharGPT, samples: Tensor) -> Tensor:
        """Return the mean cross-entropy of some windows."""
        return model.loss(self.samples[samples])

    @torch.no_grad()
    def evaluate(self, model: char_gpt.CharGPT) -> float:
        """Return the mean cross-entropy of the held-out windows."""
        return model.loss(self.held_out).item()


def run(settings: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Train every arm at every batch size."""
    parameters = sum(p.numel() for p in Windows(settings, 0).model().parameters())
    found = comparison.compare(settings, lambda seed: Windows(settings, seed), progress)
    return {"parameters": parameters, "arms": found}


def claims(result: dict[str, Any]) -> list[tuple[str, float, float, bool]]:
    """Return what the figures must show, in the worst seed."""
    found = result["figures"]["arms"]
    rules = min(comparison.worst(found[name]) for name in ("constant", "linear", "sqrt"))
    stated = []
    for name in ("micro", "virtual"):
        ratio = rules / comparison.worst(found[name])
        text = f"the best rule's M1 over that of {found[name]['title']}, above"
        stated.append((text, ratio, 1.0, ratio > 1.0))
    return stated


def draw(result: dict[str, Any]) -> Figure:
    """Plot the held-out losses and M1."""
    settings = result["settings"]
    heading = (
        f"Character GPT, {result['figures']['parameters']:,} parameters, float32, lr"
        f" {settings['hyper']['lr']:g} at batch {settings['batches'][0]}: the same windows in the"
        " same order, held-out loss"
    )
    interval = settings["windows"] / settings["evaluations"]
    seen = [interval * i for i in range(1, settings["evaluations"] + 1)]
    return comparison.draw(result, heading, "windows seen", seen)
