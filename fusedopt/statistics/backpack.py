"""BackpackSquares: sums of squares that BackPACK has made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..tracing import untraced
from .base import MissingSquares, Statistics
from .grad_version import GradVersion
from .spent import STALE, Arrivals, Spent


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
        self._sums: dict[int, _Sum] = {}
        self._spent: dict[int, Spent] = {}
        self._arrivals = Arrivals()

    def attach(self, optimizer: Any) -> None:
        """Note an optimizer that this feeds."""
        super().attach(optimizer)
        self._arrivals.watch(p for group in optimizer.param_groups for p in group["params"])

    def count_of(self, parameter: Tensor) -> int:
        """Return how many samples were gathered for a parameter."""
        own = self._sums.get(id(parameter))
        return self.batch_size or 0 if own is None else own.count

    def sum_of_squares(self, parameter: Tensor) -> Tensor | None:
        """Return the sum of squares of a parameter."""
        own = self._sums.get(id(parameter))
        if own is not None:
            return own.squares
        squares: Tensor | None = getattr(parameter, "sum_grad_squared", None)
        return squares

    @untraced
    @torch.no_grad()
    def accumulate(self, optimizer: Any) -> None:
        """Add what the last backward pass left to what earlier ones did.

        Args:
            optimizer: whose parameters are meant.

        Raises:
            RuntimeError: where ``batch_size`` is not set, or nothing was left since the last call.
        """
        size = self._size()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if not any(_left(p) for p in parameters):
            raise RuntimeError(
                "no parameter has a sum_grad_squared: call accumulate() once, after each backward"
                " pass within backpack(SumGradSquared())"
            )
        for p in parameters:
            own = self._sums.get(id(p))
            if own is None or own.is_spent(p):
                own = self._sums[id(p)] = _Sum()
            own.add(getattr(p, "sum_grad_squared", None), size)
            own.gradient = GradVersion(p.grad)
            p.sum_grad_squared = None
        self._arrivals.watch(parameters)
        self._arrivals.forget(parameters)

    def used(self, parameters: Sequence[Tensor]) -> None:
        """Note that a step has used what was gathered for some parameters."""
        for p in parameters:
            if id(p) in self._sums:
                self._sums[id(p)].version = GradVersion(p.grad)
            self._spent[id(p)] = Spent(p, _left(p))

    def check(self, parameters: Sequence[Tensor]) -> None:
        """Raise where squares are missing, or nobody knows of how many samples."""
        for p in parameters:
            own = self._sums.get(id(p))
            if own is None:
                self._size()
            spent = self._spent.get(id(p))
            if spent is not None and spent.is_stale(p, _left(p)):
                raise MissingSquares(p, "its sum_grad_squared" + STALE)
            problem = self._arrivals.problem(p) if own is None else own.problem(p)
            if problem is not None:
                raise MissingSquares(
                    p,
                    f"its gradient {problem}, and its sum_grad_squared not: call"
                    " accumulate(optimizer) after each backward pass where there are several, and"
                    " to clip pass clip=fusedopt.GlobalNorm(max_norm) to the optimizer",
                )
            if self.sum_of_squares(p) is None:
                raise MissingSquares(
                    p,
                    "it has a gradient but no sum_grad_squared: call backward within"
                    " backpack(SumGradSquared()), with the module extended",
                )

    def _size(self) -> int:
        if not self.batch_size or self.batch_size < 1:
            raise RuntimeError(
                "BackPACK does not say how many samples its sums have: set statistics.batch_size"
                f" (now {self.batch_size!r}) before the step"
            )
        return self.batch_size

    def reset(self, parameters: Sequence[Tensor] | None = None) -> None:
        """Forget what was gathered; ``optimizer.zero_grad()`` calls this."""
        own = self._all_parameters() if parameters is None else parameters
        self._arrivals.watch(own)
        self._arrivals.forget(own)
        for p in own:
            self._sums.pop(id(p), None)
            self._spent.pop(id(p), None)
            # BackPACK leaves it there, and it does not belong to the next gradient.
            if getattr(p, "sum_grad_squared", None) is not None:
                p.sum_grad_squared = None  # type: ignore[attr-defined]


def _left(parameter: Tensor) -> list[Tensor]:
    """Return what BackPACK has left on a parameter."""
    squares = getattr(parameter, "sum_grad_squared", None)
    return [] if squares is None else [squares]


class _Sum:
    """What several backward passes left for one parameter."""

    def __init__(self) -> None:
        self.squares: Tensor | None = None
        self.count = 0
        # The gradient as the last ``accumulate`` found it.
        self.gradient = GradVersion(None)
        # The gradient that a step has used.
        self.version: GradVersion | None = None

    def add(self, squares: Tensor | None, count: int) -> None:
        """Take the sum over ``count`` samples; None for no contribution of theirs."""
        self.count += count
        if squares is not None:
            self.squares = squares.clone() if self.squares is None else self.squares.add_(squares)

    def problem(self, parameter: Tensor) -> str | None:
        """Say how the gradient is not the one that was accumulated; None where it is."""
        same = not _left(parameter) and self.gradient.holds(parameter.grad)
        return None if same else "has changed since the last accumulate()"

    def is_spent(self, parameter: Tensor) -> bool:
        """Whether a step has used this, and the gradient has been cleared since."""
        return self.version is not None and not self.version.is_same_tensor(parameter.grad)
