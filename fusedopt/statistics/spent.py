"""What a step has used of tensors that others leave on parameters, and may leave there too long."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .records import Stamp, mark, mark_of

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
        self._gradient = Stamp(parameter.grad)

    def is_stale(self, parameter: Tensor, current: Sequence[Tensor]) -> bool:
        """Whether any of the current tensors was used, with a gradient that is gone."""
        if self._gradient.holds(parameter.grad):
            # A second step with the same gradient, as every optimizer takes it.
            return False
        return any((mark_of(x), x._version) in self._used for x in current)
