"""What an optimizer needs to know about the samples of a batch, wherever it comes from.

Let r_i be sample i's contribution to ``p.grad`` (its row), so that the rows add up to ``p.grad``,
and S = sum_i r_i^2, elementwise. With N samples and a weight s, g_i = s r_i is the sample's own
gradient: s = N where the loss is a mean over samples, s = 1 where it is a sum. Then

    mean of g_i     = s / N   * p.grad
    mean of g_i^2   = s^2 / N * S
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..memory.storage import local_tensors
from ..source import MissingInput, RuleInputs, Source
from ..tracing import untraced
from . import shards

REDUCTIONS = ("mean", "sum")


class NoiseScale(NamedTuple):
    """Gradient noise scale (McCandlish et al., arXiv 1812.06162, appendix A.1).

    Attributes:
        signal: unbiased estimate of the squared norm of the expected gradient.
        noise: unbiased estimate of the trace of the covariance of one sample's gradient.
        ratio: noise / signal, in samples: the batch size at which both are of a size.
    """

    signal: Tensor
    noise: Tensor
    ratio: Tensor


class MissingSquares(MissingInput):
    """A parameter has no squares, or not those of its gradient."""


class Statistics(Source):
    """Per-sample squared gradients of the parameters of an optimizer: base of all sources.

    Args:
        loss_reduction: ``"mean"`` where the loss is a mean over samples, ``"sum"`` where it is a
            sum.

    Raises:
        ValueError: for another reduction.
    """

    names = ("gradient", "sum of squares")
    instead_of_unscaling = (
        ". To clip, pass clip=fusedopt.GlobalNorm(max_norm), which bounds the unscaled norm"
    )

    def __init__(self, loss_reduction: str = "mean") -> None:
        if loss_reduction not in REDUCTIONS:
            raise ValueError(
                f"loss_reduction must be one of {', '.join(REDUCTIONS)}, got {loss_reduction!r}"
            )
        super().__init__()
        self.loss_reduction = loss_reduction
        self._averages: list[Tensor] | None = None
        self._averaged = 0.0
        self._warned = False

    @property
    @untraced
    def samples(self) -> int:
        """Number of samples gathered since the last ``zero_grad``."""
        parameters = self.parameters()
        return self.count(parameters) if parameters else 0

    def count_of(self, parameter: Tensor) -> int:
        """Return how many samples were gathered for a parameter."""
        raise NotImplementedError

    def count(self, parameters: Sequence[Tensor]) -> int:
        """Return how many samples were gathered for each of some parameters.

        Raises:
            RuntimeError: where they are none, or not as many for all.
        """
        counts = {self.count_of(p): p for p in parameters}
        if len(counts) > 1:
            (a, p), (b, q) = list(counts.items())[:2]
            raise RuntimeError(
                f"{self.name_of(p)} has seen {a} samples since its gradient was cleared,"
                f" {self.name_of(q)} {b}: clear the gradients of all parameters of an optimizer at"
                " the same time"
            )
        count = next(iter(counts))
        if count < 1:
            raise RuntimeError("no samples were gathered: the batch was empty")
        return count

    def sum_of_squares(self, parameter: Tensor) -> Tensor | None:
        """Return S of a parameter, or None where nothing was gathered for it."""
        raise NotImplementedError

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """Return what the rows of a parameter add up to."""
        return parameter.grad

    def check(self, parameters: Sequence[Tensor]) -> None:
        """Raise where the samples of these parameters cannot be used.

        Raises:
            MissingSquares: for a parameter without squares.
            RuntimeError: for anything else.
        """
        for p in parameters:
            if self.sum_of_squares(p) is None:
                raise MissingSquares(p, "it has a gradient, but nothing was gathered for it")

    def inputs(self, parameters: list[Tensor], gradients: list[Tensor], plain: bool) -> RuleInputs:
        """Return what a rule takes: gradients and sums of squares.

        Args:
            parameters: to be updated.
            gradients: what ``find`` returned for them.
            plain: whether nothing has to be known of either before the update.
        """
        return RuleInputs([gradients, [self._squares(p) for p in parameters]])

    def factors(self, virtual_batch_size: float, count: int) -> dict[str, float]:
        """Return what turns gradients and sums of squares into the moments of this step.

        The mean over all subsets of b of the N samples of the squared mean gradient of the subset
        is (1 - w) g^2 + w q, with g the mean gradient, q the mean square, and w = (N - b) / (b (N -
        1)): b = N is the ordinary second moment, b = 1 the mean of per-sample squares.

        Args:
            virtual_batch_size: b.
            count: N.

        Returns:
            The weights of g^2 and of the sum over samples of squared contributions to g.
        """
        b = virtual_batch_size
        if b > count and not self._warned:
            self._warned = True
            warnings.warn(
                f"virtual_batch_size={b} is more than the {count} samples of this step, from which"
                " the moment of a larger batch cannot be had: this step is ordinary",
                UserWarning,
                stacklevel=2,
            )
        w = (count - b) / (b * (count - 1)) if b < count else 0.0
        # Contributions to g, N of which add up to it, are 1 / N of the samples' gradients.
        return {"mean_weight": 1.0 - w, "square_weight": w * count}

    def parameters(self) -> Sequence[Tensor]:
        """List the parameters that something was gathered for."""
        return [p for p in self._all_parameters() if self.sum_of_squares(p) is not None]

    def weight(self, count: int) -> float:
        """Return the weight s that makes rows gradients of samples."""
        return float(count) if self.loss_reduction == "mean" else 1.0

    def gradient_factor(self, count: int) -> float:
        """Return what turns the sum of the rows into the mean of the samples' gradients."""
        return self.weight(count) / count

    @untraced
    def mean_square(self, parameter: Tensor) -> Tensor:
        """Return the mean over samples of the squared gradient of a parameter.

        Args:
            parameter: of the model.

        Returns:
            Tensor of the parameter's shape in float32, or float64 where the parameter is.

        Raises:
            RuntimeError: where nothing was gathered for it.
        """
        self.check([parameter])
        count = self.count([parameter])
        return self._squares(parameter) * (self.weight(count) ** 2 / count)

    @untraced
    def signal_to_noise(self, parameter: Tensor) -> Tensor:
        """Return the gradient signal-to-noise ratio of each element.

        The squared mean of the samples' gradients over their variance (Liu et al., arXiv
        2001.07384, definition 1), with the variance of the batch, which rounding cannot make
        negative. Where it is 0 the ratio is inf, or nan if the mean is 0, too.

        Args:
            parameter: of the model.

        Returns:
            Tensor of the parameter's shape.
        """
        mean_square = self.mean_square(parameter)
        count = self.count([parameter])
        squared_mean = self._mean(parameter, mean_square.dtype, count).square()
        return squared_mean / (mean_square - squared_mean).clamp_(min=0)

    @untraced
    @torch.no_grad()
    def noise_scale(self, decay: float | None = None) -> NoiseScale:
        """Return the gradient noise scale, from the same buffers that the optimizer reads.

        Call it between backward and ``zero_grad``. Nothing is read on the host. Under a gradient
        scaler signal and noise are those of the scaled gradients, and the ratio is unchanged; but
        not between ``unscale_`` and ``step``, since it divides the gradients alone.

        Args:
            decay: average signal and noise over calls, exponentially with this weight on the past
                (bias-corrected), before dividing: a ratio of one step's estimates is biased.

        Returns:
            Three tensors of shape () in float64 on the parameters' device.

        Raises:
            RuntimeError: for fewer than two samples, or where no parameter has gradients.
            ValueError: for a decay outside [0, 1).
        """
        if decay is not None and not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        parameters = list(self.parameters())
        if not parameters:
            raise RuntimeError("no parameter has squares: call backward before noise_scale()")
        self.check(parameters)
        count = self.count(parameters)
        if count < 2:
            raise RuntimeError(f"the noise scale needs at least two samples, there are {count}")
        device = parameters[0].device
        parts = []
        for p in parameters:
            squares = self._squares(p)
            gradient, squares = local_tensors([self._mean(p, squares.dtype, count), squares])
            # In float64: on a CPU, torch loses 0.3 % of the norm of forty million float32.
            norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
            total = squares.sum(dtype=torch.float64)
            parts.append((p, torch.stack([norm.double().square(), total.double()])))
        mean, total = shards.total(parts, device).unbind()
        total = total * (self.weight(count) ** 2 / count)
        signal = (count * mean - total) / (count - 1)
        noise = (total - mean) / (1 - 1 / count)
        if decay is not None:
            signal, noise = self._average(signal, noise, decay)
        return NoiseScale(signal, noise, noise / signal)

    def _average(self, signal: Tensor, noise: Tensor, decay: float) -> tuple[Tensor, Tensor]:
        if self._averages is None:
            self._averages = [torch.zeros_like(signal), torch.zeros_like(noise)]
        for average, value in zip(self._averages, (signal, noise), strict=True):
            average.lerp_(value, 1 - decay)
        self._averaged = decay * self._averaged + (1 - decay)
        signal, noise = (average / self._averaged for average in self._averages)
        return signal, noise

    def name_of(self, parameter: Tensor) -> str:
        """Name a parameter in messages."""
        return f"a parameter of shape {tuple(parameter.shape)}"

    def _squares(self, parameter: Tensor) -> Tensor:
        squares = self.sum_of_squares(parameter)
        if squares is None:
            raise RuntimeError(
                f"no squares were gathered for {self.name_of(parameter)}: it is not observed, is"
                " frozen, or backward has not been called"
            )
        return squares

    def _mean(self, parameter: Tensor, dtype: torch.dtype, count: int) -> Tensor:
        gradient = self.gradient(parameter)
        if gradient is None:
            raise RuntimeError(
                f"{self.name_of(parameter)} has no gradient: call this between backward and"
                " zero_grad"
            )
        return gradient.to(dtype) * self.gradient_factor(count)
