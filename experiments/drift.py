"""How fast Adam moves under the square-root rule: what is to be expected, and measurements of it.

A coordinate whose gradient has mean mu and, over samples, variance sigma^2, moves by lr mu /
sqrt(v) a step, and v settles at the mean square of a batch's gradient, mu^2 + sigma^2 / B. Under
the rule, lr grows as sqrt(B), and steps are fewer by B. So with r = mu^2 / sigma^2 and kappa = B /
B0, the movement per sample, over that at batch B0, is

    D = kappa^-1/2 sqrt((r + 1 / B0) / (r + 1 / (kappa B0))).

It is 1 where noise dominates the gradient of the larger batch, too, r << 1 / (kappa B0), which is
what the rule is derived for; and kappa^-1/2 where the mean dominates the smaller batch's.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fusedopt
from fusedopt import scaling

from .arms import Hyper, Task, backend
from .moments import Moments, flat


def ratio(r: float, base_batch: int, kappa: float) -> float:
    """Return D of one coordinate."""
    return math.sqrt((r + 1 / base_batch) / (r + 1 / (kappa * base_batch)) / kappa)


def of_descent(moments: Moments, base_batch: int, batch: int) -> float:
    """Return D averaged over coordinates, each with its part in the descent at the base batch.

    A coordinate that moves by mu / sqrt(v) changes the loss by mu^2 / sqrt(v), to first order.
    """
    rates = []
    for size in (base_batch, batch):
        rate = moments.squared_mean() / moments.batch_square(size).sqrt()
        # 0 / 0 where no sample has a gradient.
        rates.append(math.sqrt(size) / size * rate.nan_to_num(0.0).sum().item())
    return rates[1] / rates[0]


def frozen_displacement(
    task: Task, model: nn.Module, hyper: Hyper, samples: Tensor, batch: int, burn_in: int
) -> Tensor:
    """Return what AdamW moves by per sample where the gradients stay those of one point.

    The optimizer steps through its parameters as in a training, but they are not the model's,
    which stays where it is.

    Args:
        task: whose loss.
        model: at the point.
        hyper: of AdamW for this batch size.
        samples: cut into batches in this order.
        batch: samples a step.
        burn_in: samples after which the movement counts.

    Returns:
        Vector of all elements, float64.
    """
    parameters = list(model.parameters())
    moved = [torch.zeros_like(p) for p in parameters]
    optimizer = fusedopt.AdamW(moved, **hyper, backend=backend(parameters[0].device))
    start = flat(moved)
    for count, part in enumerate(samples.split(batch)):
        if count * batch == burn_in:
            start = flat(moved)
        gradients = torch.autograd.grad(task.loss(model, part), parameters)
        for p, gradient in zip(moved, gradients, strict=True):
            p.grad = gradient
        optimizer.step()
    return (flat(moved) - start) / (len(samples) - burn_in)


def slowed(losses: list[float], drifts: list[float]) -> list[float]:
    """Return the losses of a training that follows another's path with other speed.

    Args:
        losses: of the other, at the start and at each evaluation.
        drifts: speed per sample over the other's, at the same places of the path.

    Returns:
        Losses at each evaluation but the start.
    """
    pace = 1 / np.asarray(drifts)
    seen = np.concatenate([[0.0], np.cumsum((pace[1:] + pace[:-1]) / 2)])
    evaluations = np.arange(1, len(losses))
    return np.exp(np.interp(evaluations, seen, np.log(losses))).tolist()


def scalar(settings: dict[str, Any], betas: tuple[float, float], kappa: float) -> Tensor:
    """Measure the drift of scalar Gaussian gradients with AdamW.

    Args:
        settings: ``r``, ``base_batch``, ``replicates``, ``steps``, ``burn_in`` (steps), ``seed``.
        betas: at the base batch.
        kappa: batch size over the base's.

    Returns:
        Movement per sample, (r, replicate), in units of the base batch's lr.
    """
    batch = settings["base_batch"] * kappa
    base = {"lr": 1.0, "betas": betas, "eps": 0.0, "weight_decay": 0.0}
    hyper = scaling.rescale(base, settings["base_batch"], batch, "sqrt", beta_form="power")
    mean = torch.tensor(settings["r"], dtype=torch.float64).sqrt()[:, None]
    position = torch.zeros(len(mean), settings["replicates"], dtype=torch.float64)
    optimizer = fusedopt.AdamW([position], **hyper, backend="reference")
    generator = torch.Generator().manual_seed(settings["seed"])
    start = position.clone()
    for step in range(settings["burn_in"] + settings["steps"]):
        if step == settings["burn_in"]:
            start = position.clone()
        noise = torch.randn(position.shape, generator=generator, dtype=torch.float64)
        position.grad = mean + noise / math.sqrt(batch)
        optimizer.step()
    return (start - position) / (settings["steps"] * batch)
