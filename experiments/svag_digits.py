"""SVAG of Adam on the digits: where the batch's noise dominates, and where it does not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

import fusedopt

from .arms import backend
from .digits_task import IMAGES, Digits


def compare(
    settings: dict[str, Any], arm: dict[str, Any], advance: Callable[[], object]
) -> dict[str, Any]:
    """Train with every l of an arm, from the same parameters for each seed.

    Args:
        settings: with ``hyper``, ``seeds`` and ``evaluations``.
        arm: with ``batch``, ``steps`` and ``ells``, 1 the first.
        advance: called after each training.

    Returns:
        ``losses[l][seed index][evaluation]``; ``distance[l]``, the RMS over time of the log of the
        mean loss over that of l = 1; ``spread``, likewise the standard deviation of the log of the
        loss over seeds at l = 1; and ``noise_scale``, before training and after it with l = 1.
    """
    losses: dict[int, list[list[float]]] = {}
    scales: list[list[float]] = []
    for ell in arm["ells"]:
        losses[ell] = []
        for seed in settings["seeds"]:
            task = Digits(1, seed, settings["device"])
            model = task.model()
            before = _noise_scale(task, model)
            losses[ell].append(_train(settings, arm, task, model, ell))
            if ell == 1:
                scales.append([before, _noise_scale(task, model)])
            advance()
    curves = {ell: torch.tensor(rows, dtype=torch.float64) for ell, rows in losses.items()}
    return {
        "losses": losses,
        "distance": {e: _rms((curves[e].mean(0) / curves[1].mean(0)).log()) for e in losses},
        "spread": _rms(curves[1].log().std(0)),
        "noise_scale": torch.tensor(scales).mean(0).tolist(),
    }


def _rms(values: torch.Tensor) -> float:
    return math.sqrt(values.square().mean().item())


def _train(
    settings: dict[str, Any], arm: dict[str, Any], task: Digits, model: torch.nn.Module, ell: int
) -> list[float]:
    where = backend(task.images.device)
    adam = fusedopt.Adam(model.parameters(), **settings["hyper"], backend=where)
    svag = fusedopt.SVAG(adam, ell=ell)
    # Every l draws batches of its own, as another seed would.
    generator = torch.Generator().manual_seed(1000 * task.seed + ell)

    def backward() -> None:
        samples = torch.randint(IMAGES, (arm["batch"],), generator=generator)
        task.loss(model, samples.to(task.images.device)).backward()

    every = arm["steps"] // settings["evaluations"] * ell**2
    losses = [task.evaluate(model)]
    for step in range(1, arm["steps"] * ell**2 + 1):
        backward()
        svag.hold()
        backward()
        svag.step()
        svag.zero_grad()
        if step % every == 0:
            losses.append(task.evaluate(model))
    return losses


def _noise_scale(task: Digits, model: torch.nn.Module) -> float:
    """Return tr(Sigma) / |G|^2 over all images, in samples."""
    statistics = fusedopt.PerSampleSquares(model, backend=backend(task.images.device))
    task.loss(model, torch.arange(IMAGES, device=task.images.device)).backward()
    scale = statistics.noise_scale().ratio.item()
    statistics.remove()
    model.zero_grad()
    return scale
