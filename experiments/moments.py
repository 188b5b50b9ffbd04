"""Mean and variance of the samples' gradients at given parameters, element by element."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fusedopt

from .arms import Task, backend

# Samples of one backward pass.
_CHUNK = 1024


@dataclass(frozen=True)
class Moments:
    """What some samples say about the gradients of the samples that they were drawn from.

    Attributes:
        mean: mean gradient, float64 of shape (elements of all parameters,).
        variance: unbiased variance of one sample's gradient, of the same shape.
        count: samples that were looked at.
        population: samples that they, and batches, are drawn from without replacement.
    """

    mean: Tensor
    variance: Tensor
    count: int
    population: float = math.inf

    def squared_mean(self) -> Tensor:
        """Return the unbiased estimate of mu^2, which may be negative.

        It is (n g^2 - q) / (n - 1), with q the mean square of n samples' gradients, where the
        population has no end, and g^2 where all of it was looked at.
        """
        return self.mean.square() - self.variance * (1 / self.count - 1 / self.population)

    def batch_square(self, batch: int) -> Tensor:
        """Return the unbiased estimate of the mean square of a batch's gradient.

        It is mu^2 + sigma^2 (1 / batch - 1 / population), in which the population cancels, and
        not negative for batch <= count.
        """
        return self.mean.square() + self.variance * (1 / batch - 1 / self.count)

    def signal(self) -> float:
        """Return the squared norm of mu."""
        return self.squared_mean().sum().item()

    def noise(self) -> float:
        """Return the trace of the covariance of one sample's gradient."""
        return self.variance.sum().item()


def model_at(task: Task, parameters: list[Tensor]) -> nn.Module:
    """Return a model of the task with these parameters."""
    model = task.model()
    with torch.no_grad():
        for p, value in zip(model.parameters(), parameters, strict=True):
            p.copy_(value)
    return model


def measure(task: Task, model: nn.Module, samples: Tensor, population: float = math.inf) -> Moments:
    """Return the moments of some samples' gradients at the model's parameters.

    Args:
        task: whose loss.
        model: of the task, not observed by another PerSampleSquares.
        samples: of ``task.order``.
        population: see ``Moments``.
    """
    parameters = list(model.parameters())
    statistics = fusedopt.PerSampleSquares(model, backend=backend(parameters[0].device))
    model.zero_grad()
    count = len(samples)
    for part in samples.split(_CHUNK):
        (task.loss(model, part) * (len(part) / count)).backward()
    mean = flat([p.grad for p in parameters if p.grad is not None])
    mean_square = flat([statistics.mean_square(p) for p in parameters])
    statistics.remove()
    variance = (mean_square - mean.square()).clamp_(min=0) * (count / (count - 1))
    return Moments(mean, variance, count, population)


def flat(tensors: list[Tensor]) -> Tensor:
    """Return all elements in one float64 vector."""
    return torch.cat([t.detach().flatten().double() for t in tensors])
