"""Tensors that others leave on parameters: what a step has used, and what gradients they are of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, distributed

from .grad_version import GradVersion, mark, mark_of, weakly

STALE = (
    " has been used by an earlier step, and its gradient is another since: the last backward pass"
    " made none, or gradients were cleared without it. Call optimizer.zero_grad(), not the model's,"
    " and run every backward pass with what makes it"
)


class Spent:
    """Tensors of one parameter that a step has used, and the gradient that was there with them.

    Args:
        parameter: whose they are.
        used: the tensors; they are not kept alive.
    """

    def __init__(self, parameter: Tensor, used: Sequence[Tensor]) -> None:
        # What is written in place is new.
        self._used = {(mark(x), x._version) for x in used}
        self._gradient = GradVersion(parameter.grad)

    def is_stale(self, parameter: Tensor, current: Sequence[Tensor]) -> bool:
        """Whether any of the current tensors was used, with a gradient that is gone."""
        if self._gradient.holds(parameter.grad):
            # A second step with the same gradient, as every optimizer takes it.
            return False
        return any((mark_of(x), x._version) in self._used for x in current)


class Arrivals:
    """What autograd has added to the gradients of some parameters since they were cleared."""

    def __init__(self) -> None:
        self._of: dict[int, _Arrival] = {}

    def watch(self, parameters: Iterable[Tensor]) -> None:
        """See the gradients of parameters as they arrive."""
        for p in parameters:
            if p.requires_grad and id(p) not in self._of:
                self._of[id(p)] = _Arrival(p)

    def problem(self, parameter: Tensor) -> str | None:
        """Say why what one backward pass left is not that of the gradient; None where it may be."""
        own = self._of.get(id(parameter))
        if own is None or own.count == 0 or not own.version.is_same_tensor(parameter.grad):
            # Gradients that were put there by hand are what they are.
            return None
        if distributed.is_available() and distributed.is_initialized():
            # Which are averaged after they have arrived.
            return None
        if not own.version.holds(parameter.grad):
            return "was changed between backward and step()"
        return "is the sum of several backward passes" if own.count > 1 else None

    def forget(self, parameters: Iterable[Tensor]) -> None:
        """Note that gradients were cleared, or taken into account."""
        for p in parameters:
            if id(p) in self._of:
                self._of[id(p)].count = 0


class _Arrival:
    """How often autograd has added to one gradient, and the gradient as it was then."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        self.count = 0
        self.version = GradVersion(None)
        # Where the parameter has been converted, its hooks went with the old contents.
        self._handle: Any = parameter.register_post_accumulate_grad_hook(weakly(self._arrived))

    def _arrived(self, _: Tensor) -> None:
        gradient = self.parameter.grad
        # Added in place, to what was there and had not been written since.
        adds = self.version.is_same_tensor(gradient) and self.version.writes(gradient) == 1
        self.count = self.count + 1 if adds else 1
        self.version = GradVersion(gradient)
