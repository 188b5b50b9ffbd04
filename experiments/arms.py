"""Trainings that differ in the batch size alone: arms, the training, how results compare."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import fusedopt
from fusedopt import scaling

Hyper = dict[str, Any]


class Task(Protocol):
    """Something to train on.

    Attributes:
        order: the samples in the order in which every batch size sees them.
        interval: the loss is evaluated whenever so many samples have been seen.
    """

    order: Tensor
    interval: int

    def model(self) -> nn.Module:
        """Return a model that starts from the same parameters each time."""

    def loss(self, model: nn.Module, samples: Tensor) -> Tensor:
        """Return the mean loss of some samples of ``order``."""

    def evaluate(self, model: nn.Module) -> float:
        """Return the loss that is compared."""


@dataclass(frozen=True)
class Arm:
    """An optimizer, and how its hyper-parameters follow the batch size.

    Attributes:
        title: for plots.
        rule: of ``fusedopt.scaling``.
        squares: whose gradient is squared for the second moment: the ``"batch"``'s (AdamW), a
            ``"micro"``-batch's of the base batch size, or every ``"sample"``'s.
        virtual_batch_size: with squares of samples.
        beta_form: None for the rule's own.
        eps_power: eps is multiplied by kappa to this power, besides.
        decay_power: so is the weight decay.
        beta1_fixed: leave betas[0] as it is.
    """

    title: str
    rule: str
    squares: str = "batch"
    virtual_batch_size: int = 1
    beta_form: str | None = None
    eps_power: float = 0.0
    decay_power: float = 0.0
    beta1_fixed: bool = False

    def hyper(self, base: Hyper, base_batch: int, batch: int) -> Hyper:
        """Return the hyper-parameters for a batch size."""
        kappa = batch / base_batch
        new = scaling.rescale(base, base_batch, batch, self.rule, beta_form=self.beta_form)
        new["eps"] *= kappa**self.eps_power
        new["weight_decay"] *= kappa**self.decay_power
        if self.beta1_fixed:
            new["betas"] = (base["betas"][0], new["betas"][1])
        return new


@dataclass
class Run:
    """What a training left: the losses of ``Task.evaluate``, and the trained parameters."""

    losses: list[float]
    parameters: list[Tensor]


def train(
    task: Task,
    arm: Arm,
    hyper: Hyper,
    base_batch: int,
    batch: int,
    advance: Callable[[], object] = lambda: None,
) -> Run:
    """Train a new model of the task on all of ``task.order``.

    Args:
        task: what to train on.
        arm: the optimizer.
        hyper: its hyper-parameters for this batch size.
        base_batch: samples of a micro-batch.
        batch: samples a step.
        advance: called at each evaluation.
    """
    model = task.model()
    step = _stepper(task, model, arm, hyper, base_batch)
    losses = []
    for count, samples in enumerate(task.order.split(batch), 1):
        step(samples)
        if count * batch % task.interval == 0:
            losses.append(task.evaluate(model))
            advance()
    return Run(losses, [p.detach().clone() for p in model.parameters()])


def backend(device: torch.device) -> str:
    """Return the backend to train with: never Triton's interpreter, which would take hours."""
    return "reference" if device.type == "cpu" else "auto"


def _stepper(
    task: Task, model: nn.Module, arm: Arm, hyper: Hyper, base_batch: int
) -> Callable[[Tensor], None]:
    params = list(model.parameters())
    hyper = {**hyper, "backend": backend(params[0].device)}
    if arm.squares == "micro":
        micro = fusedopt.MicroBatchSquares()
        optimizer = fusedopt.BatchDecoupledAdam(params, **hyper, statistics=micro)
        return lambda samples: _micro_step(task, model, optimizer, micro, samples, base_batch)
    if arm.squares == "sample":
        statistics = fusedopt.PerSampleSquares(model, backend=hyper["backend"])
        hyper |= {"statistics": statistics, "virtual_batch_size": arm.virtual_batch_size}
        optimizer = fusedopt.BatchDecoupledAdam(params, **hyper)
    else:
        optimizer = fusedopt.AdamW(params, **hyper)
    return lambda samples: _step(task, model, optimizer, samples)


def _step(task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, samples: Tensor) -> None:
    optimizer.zero_grad()
    task.loss(model, samples).backward()
    optimizer.step()


def _micro_step(
    task: Task,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    statistics: Any,
    samples: Tensor,
    size: int,
) -> None:
    optimizer.zero_grad()
    for part in samples.split(size):
        # Contributions to the mean over the batch, so that p.grad is the batch's gradient.
        (task.loss(model, part) * (len(part) / len(samples))).backward()
        statistics.accumulate(optimizer)
    optimizer.step()


def distance(losses: list[float], reference: list[float]) -> float:
    """Return M1: the root mean square, over the evaluations, of the log of the losses' ratio."""
    logs = [math.log(a / b) for a, b in zip(losses, reference, strict=True)]
    return math.sqrt(sum(x * x for x in logs) / len(logs))
