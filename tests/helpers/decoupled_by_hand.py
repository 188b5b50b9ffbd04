"""The batch-decoupled optimizers by hand, in float64, and each way to the squares they take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from per_sample import DTYPES, mlp, randn, rows_of, virtual_square
from torch import Tensor, nn

from fusedopt import (
    BackpackSquares,
    BatchDecoupledAdam,
    GradSampleSquares,
    MicroBatchSquares,
    PerSampleSquares,
)

# One step in each type; float32 over the few steps of a trajectory here.
CLOSE = {"reference": 1e-12, "triton": 1e-5}

ADAM: dict[str, Any] = {"lr": 0.05, "betas": (0.6, 0.8), "weight_decay": 0.1}

RMSPROP: dict[str, Any] = {"lr": 0.05, "alpha": 0.7, "weight_decay": 0.1}


# Sources


class Source:
    """One way to the squares: attaches to a model and runs a backward over a batch."""

    def __init__(self, model: nn.Module, backend: str = "reference", reduction: str = "mean"):
        self.model, self.backend, self.reduction = model, backend, reduction
        self.statistics: Any = None
        self.optimizer: Any = None

    def loss(self, out: Tensor, n: int) -> Tensor:
        errors = (out - target_alone(out)).square().flatten(1).sum(1)
        return errors / n if self.reduction == "mean" else errors

    def rows(self, x: Tensor, n: int) -> list[Tensor]:
        return rows_of(self.loss(self.model(x), n), list(self.model.parameters()))


def target_alone(out: Tensor) -> Tensor:
    """Of a sample alone: the same whatever the batch that it stands in."""
    return torch.linspace(-2, 2, out[0].numel(), dtype=out.dtype, device=out.device).view_as(out[0])


class FromModel(Source):
    def __init__(self, model: nn.Module, backend: str = "reference", reduction: str = "mean"):
        super().__init__(model, backend, reduction)
        self.statistics = PerSampleSquares(model, reduction, backend=backend)

    def backward(self, x: Tensor) -> None:
        self.loss(self.model(x), len(x)).sum().backward()


class FromMicroBatches(Source):
    """Micro-batches of one sample: their squares are the samples'."""

    def __init__(self, model: nn.Module, backend: str = "reference", reduction: str = "mean"):
        super().__init__(model, backend, reduction)
        self.statistics = MicroBatchSquares()

    def backward(self, x: Tensor) -> None:
        for sample in x:
            self.loss(self.model(sample[None]), len(x)).sum().backward()
            self.statistics.accumulate(self.optimizer)


class FromGradSample(Source):
    def __init__(self, model: nn.Module, backend: str = "reference", reduction: str = "mean"):
        super().__init__(model, backend, reduction)
        self.statistics = GradSampleSquares()

    def backward(self, x: Tensor) -> None:
        factor = len(x) if self.reduction == "mean" else 1
        rows = self.rows(x, len(x))
        for p, r in zip(self.model.parameters(), rows, strict=True):
            p.grad_sample = r * factor


class FromBackpack(Source):
    def __init__(self, model: nn.Module, backend: str = "reference", reduction: str = "mean"):
        super().__init__(model, backend, reduction)
        self.statistics = BackpackSquares(loss_reduction=reduction)

    def backward(self, x: Tensor) -> None:
        rows = self.rows(x, len(x))
        for p, r in zip(self.model.parameters(), rows, strict=True):
            p.grad, p.sum_grad_squared = r.sum(0), r.square().sum(0)
        self.statistics.batch_size = len(x)


SOURCES: dict[str, type[Source]] = {
    "model": FromModel,
    "micro-batches": FromMicroBatches,
    "grad-sample": FromGradSample,
    "backpack": FromBackpack,
}

each_source = pytest.mark.parametrize("source", SOURCES)


def train(
    source: str,
    make: Callable[..., Any] = BatchDecoupledAdam,
    *,
    batches: Sequence[int] = (4, 4, 3),
    backend: str = "reference",
    reduction: str = "mean",
    dtype: torch.dtype | None = None,
    **options: Any,
) -> tuple[nn.Module, Any, Any]:
    """Train the small network for a few steps; return it with optimizer and statistics."""
    model = mlp(dtype or DTYPES[backend])
    part = SOURCES[source](model, backend, reduction)
    defaults = ADAM if make is BatchDecoupledAdam else RMSPROP
    arguments = {**defaults, "virtual_batch_size": 2, **options}
    part.optimizer = make(
        model.parameters(), statistics=part.statistics, backend=backend, **arguments
    )
    for seed, n in enumerate(batches):
        part.backward(randn(n, 4, dtype=dtype or DTYPES[backend], seed=seed))
        part.optimizer.step()
        part.optimizer.zero_grad()
    return model, part.optimizer, part.statistics


# The definition, in float64


class ByHand:
    """The update as printed, from per-sample gradients ``[N, *p]``."""

    def __init__(self, params: Sequence[Tensor], b: int, **options: Any) -> None:
        self.params = [p.detach().double().clone() for p in params]
        self.b, self.options, self.t = b, options, 0
        self.state: list[dict[str, Tensor]] = [{} for _ in self.params]

    def _input(self, samples: Tensor, g: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        """Mean over all subsets of b samples, by enumeration; of the mean's square above N."""
        if self.b >= len(samples):
            return (g + shift).square()
        n, b = len(samples), self.b
        if isinstance(shift, float):
            return virtual_square(samples, b)
        w = (n - b) / (b * (n - 1))
        return (1 - w) * (g + shift).square() + w * samples.square().mean(0)

    def adam(self, gradients: Sequence[Tensor]) -> None:
        self.t += 1
        lr, (beta1, beta2) = self.options["lr"], self.options["betas"]
        eps, decay = self.options.get("eps", 1e-8), self.options["weight_decay"]
        sign = -1.0 if self.options.get("maximize") else 1.0
        for p, s, samples in zip(self.params, self.state, gradients, strict=True):
            samples = samples.double()
            g = samples.mean(0)
            a2 = self._input(samples, g)
            if not s:
                s.update(m=torch.zeros_like(p), v=torch.zeros_like(p), top=torch.zeros_like(p))
            s["m"] = beta1 * s["m"] + (1 - beta1) * g * sign
            s["v"] = beta2 * s["v"] + (1 - beta2) * a2
            s["top"] = torch.maximum(s["top"], s["v"])
            v = s["top"] if self.options.get("amsgrad") else s["v"]
            p *= 1 - lr * decay
            denominator = (v / (1 - beta2**self.t)).sqrt() + eps
            p -= lr * s["m"] / (1 - beta1**self.t) / denominator

    def rmsprop(self, gradients: Sequence[Tensor]) -> None:
        lr, alpha = self.options["lr"], self.options["alpha"]
        eps, decay = self.options.get("eps", 1e-8), self.options["weight_decay"]
        momentum, centred = self.options.get("momentum", 0), self.options.get("centered")
        sign = -1.0 if self.options.get("maximize") else 1.0
        for p, s, samples in zip(self.params, self.state, gradients, strict=True):
            samples = sign * samples.double()
            g = samples.mean(0)
            shift = decay * p
            a2 = self._input(samples, g, shift)
            g = g + shift
            if not s:
                s.update(v=torch.zeros_like(p), mean=torch.zeros_like(p), buf=torch.zeros_like(p))
            s["v"] = alpha * s["v"] + (1 - alpha) * a2
            s["mean"] = alpha * s["mean"] + (1 - alpha) * g
            v = s["v"] - s["mean"].square() if centred else s["v"]
            step = g / (v.sqrt() + eps)
            if momentum > 0:
                s["buf"] = step = momentum * s["buf"] + step
            p -= lr * step
