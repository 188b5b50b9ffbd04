"""BackpackSquares: sums of squares that BackPACK has made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import MissingSquares, Statistics


class BackpackSquares(Statistics):
    """Reads ``p.sum_grad_squared``, as BackPACK's SumGradSquared leaves it.

    That is the sum over samples of the squares of their contributions to ``p.grad`` (Dangel et al.,
    arXiv 1912.10985), which says nothing about how many samples there were: set ``batch_size``
    before each step at which it changes::

        statistics = fusedopt.BackpackSquares(batch_size=64)
        with backpack(SumGradSquared()):
            loss.backward()
        optimizer.step()

    BackPACK overwrites at every backward: where several make up one batch, call
    ``accumulate(optimizer)`` after each. Of such a batch ``batch_size`` is one part.

    Args:
        loss_reduction: ``"mean"`` where the loss is a mean over samples, ``"sum"`` for a sum.
        batch_size: number of samples of a backward pass.
    """

    def __init__(self, loss_reduction: str = "mean", batch_size: int | None = None) -> None:
        super().__init__(loss_reduction)
        self.batch_size = batch_size
        self._accumulated: dict[int, Tensor] = {}
        self._count = 0

    @property
    def samples(self) -> int:
        """Number of samples gathered since the last ``zero_grad``."""
        return self._count if self._accumulated else self.batch_size or 0

    def sum_of_squares(self, parameter: Tensor) -> Tensor | None:
        """Return the sum of squares of a parameter."""
        if self._accumulated:
            return self._accumulated.get(id(parameter))
        squares: Tensor | None = getattr(parameter, "sum_grad_squared", None)
        return squares

    @torch.no_grad()
    def accumulate(self, optimizer: Any) -> None:
        """Add what the last backward pass left to what earlier ones did.

        Args:
            optimizer: whose parameters are meant.

        Raises:
            RuntimeError: where ``batch_size`` is not set.
        """
        self._check_size()
        for group in optimizer.param_groups:
            for p in group["params"]:
                squares = getattr(p, "sum_grad_squared", None)
                if squares is None:
                    continue
                if id(p) in self._accumulated:
                    self._accumulated[id(p)].add_(squares)
                else:
                    self._accumulated[id(p)] = squares.clone()
                p.sum_grad_squared = None
        self._count += self.batch_size or 0

    def check(self, parameters: Sequence[Tensor]) -> None:
        """Raise where squares are missing, or nobody knows of how many samples."""
        if not self._accumulated:
            self._check_size()
        for p in parameters:
            if self.sum_of_squares(p) is None:
                raise MissingSquares(
                    p,
                    "it has a gradient but no sum_grad_squared: call backward within"
                    " backpack(SumGradSquared()), with the module extended",
                )

    def _check_size(self) -> None:
        if not self.batch_size or self.batch_size < 1:
            raise RuntimeError(
                "BackPACK does not say how many samples its sums have: set statistics.batch_size"
                f" (now {self.batch_size!r}) before the step"
            )

    def reset(self) -> None:
        """Forget what was gathered; ``optimizer.zero_grad()`` calls this."""
        self._accumulated = {}
        self._count = 0
        for p in self._all_parameters():
            # BackPACK leaves it there, and it does not belong to the next gradient.
            if getattr(p, "sum_grad_squared", None) is not None:
                p.sum_grad_squared = None  # type: ignore[attr-defined]
