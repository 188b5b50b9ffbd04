"""What micro-batches have added to the gradient of one parameter, each told from the sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..memory.dtypes import compute_dtype
from ..memory.layout import real_view
from .grad_version import GradVersion, weakly

_CHANGED = (
    "a gradient was written by hand between micro-batches, so that the last one cannot be told from"
    " the sum: change gradients after the last micro-batch only, and to clip, pass"
    " clip=fusedopt.GlobalNorm(max_norm) to the optimizer"
)


class Added:
    """The squares of one parameter, and what is known of the micro-batches so far."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        self.squares: Tensor | None = None
        self.count = 0
        # Whether they are those of all processes: see all_reduce.
        self.is_shared = False
        self._stepped = False

    def is_cleared(self) -> bool:
        """Whether the gradient was set to None, or to zero after a step: a new batch has begun."""
        raise NotImplementedError

    def accumulate(self) -> None:
        """Square what has been added to the gradient since the last call."""
        raise NotImplementedError

    def is_complete(self) -> bool:
        """Whether the gradient is as ``accumulate`` left it."""
        raise NotImplementedError

    def take(self) -> None:
        """Take the gradient as it is now for what the squares belong to."""
        raise NotImplementedError

    def zeros(self) -> Tensor:
        """Return squares of no micro-batch."""
        parameter = self.parameter
        real = compute_dtype([real_view(parameter.detach()).dtype])
        dtype = real.to_complex() if parameter.is_complex() else real
        return torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)

    def stepped(self) -> None:
        """Note that a step has used the squares."""
        self._stepped = True

    def remove(self) -> None:
        """Let go of the parameter."""

    def _add(self, gradient: Tensor) -> None:
        # Complex numbers are pairs of reals, each with a square of its own.
        real = real_view(gradient)
        squares = real.to(compute_dtype([real.dtype])).square()
        squares = torch.view_as_complex(squares) if gradient.is_complex() else squares
        self.squares = squares if self.squares is None else self.squares.add_(squares)


class _Whole(Added):
    """A parameter that autograd accumulates into.

    It adds a micro-batch's gradient to ``p.grad``, from which that could be had back only as a
    difference of sums. So the sum so far is moved aside before the addition: ``p.grad`` then holds
    the new micro-batch alone, until ``accumulate`` adds the two.
    """

    def __init__(self, parameter: Tensor) -> None:
        super().__init__(parameter)
        self._sum: Tensor | None = None
        self._seen: tuple[Tensor, int] | None = None
        self._cleared = False
        self._node, self._hook = _before_addition(parameter, self._set_aside)

    def _set_aside(self, _: Any) -> None:
        """Run before autograd adds a gradient."""
        gradient = self.parameter.grad
        if self._seen is None:
            return
        if self.is_complete():
            self._sum, self.parameter.grad = gradient, None
        elif gradient is None or self._stepped:
            self._cleared = True
        else:
            raise RuntimeError(_CHANGED)
        self._seen = None

    def is_cleared(self) -> bool:
        return self._cleared

    def accumulate(self) -> None:
        gradient = self.parameter.grad
        assert gradient is not None
        if self.is_complete():
            # Nothing new for this parameter: no contribution of this micro-batch.
            return
        if self._seen is None:
            self._add(gradient)
        elif gradient is not self._seen[0] and self._seen[0]._version == self._seen[1]:
            # Replaced by hand, as in p.grad = p.grad + new: the old sum is still there.
            self._add(gradient - self._seen[0])
        else:
            raise RuntimeError(_CHANGED)
        if self._sum is not None:
            gradient = self._sum.add_(gradient)
            self.parameter.grad, self._sum = gradient, None
        self.take()

    def take(self) -> None:
        gradient = self.parameter.grad
        assert gradient is not None
        self._seen = gradient, gradient._version

    def is_complete(self) -> bool:
        gradient = self.parameter.grad
        seen = self._seen
        return seen is not None and gradient is seen[0] and gradient._version == seen[1]

    def remove(self) -> None:
        self._hook.remove()


def _before_addition(parameter: Tensor, hook: Callable[..., None]) -> tuple[Any, Any]:
    """Call a hook before autograd adds to ``parameter.grad``; return the node and the handle."""
    # On the node that adds to p.grad: hooks on the tensor also run for torch.autograd.grad.
    with torch.enable_grad():
        view: Any = parameter.view_as(parameter)
    node = view.grad_fn.next_functions[0][0]
    return node, node.register_prehook(weakly(hook))


def added_to(parameter: Tensor) -> Added:
    """Return what gathers the micro-batches of a parameter, by who writes its gradient."""
    if hasattr(parameter, "placements"):
        return _Summed(parameter)
    # DistributedDataParallel with gradient_as_bucket_view=True.
    gradient = parameter.grad
    bucketed = gradient is not None and gradient._is_view()
    return _Bucketed(parameter) if bucketed else _Whole(parameter)


class _Summed(Added):
    """A parameter whose gradient is written behind autograd's back.

    No hook runs before that addition, so a copy of the sum is kept, and differences are taken.
    """

    def __init__(self, parameter: Tensor) -> None:
        super().__init__(parameter)
        self._copy: Tensor | None = None
        self._seen: GradVersion | None = None

    def is_cleared(self) -> bool:
        gradient = self.parameter.grad
        if self._seen is None or gradient is None or self.is_complete():
            return self._seen is not None and gradient is None
        # Another tensor; or zeroed in place, which only after a step is not a mistake.
        return self._stepped or not self._seen.is_same_tensor(gradient)

    def accumulate(self) -> None:
        gradient = self.parameter.grad
        assert gradient is not None
        if self.is_complete():
            return
        self._add(gradient if self._copy is None else gradient - self._copy)
        self.take()

    def take(self) -> None:
        gradient = self.parameter.grad
        assert gradient is not None
        self._copy, self._seen = gradient.clone(), GradVersion(gradient)

    def is_complete(self) -> bool:
        gradient = self.parameter.grad
        return gradient is not None and self._seen is not None and self._seen.holds(gradient)


class _Bucketed(_Summed):
    """A parameter whose gradient is a view of memory that ``DistributedDataParallel`` reduces.

    The gradient must stay where it is, and may become another view of the same sum, once buckets
    are made anew after the first backward pass.
    """

    def __init__(self, parameter: Tensor) -> None:
        super().__init__(parameter)
        self._cleared = False
        self._node, self._hook = _before_addition(parameter, self._look)

    def _look(self, _: Any) -> None:
        """Run before a gradient is added: is the sum so far still there?"""
        gradient = self.parameter.grad
        if self._seen is None or self.is_complete():
            return
        if gradient is None or self._stepped:
            self._cleared = True
        elif self._copy is not None and not torch.equal(gradient, self._copy):
            if bool(gradient.any()):
                raise RuntimeError(_CHANGED)
            self._cleared = True

    def is_cleared(self) -> bool:
        return self._cleared

    def remove(self) -> None:
        self._hook.remove()
