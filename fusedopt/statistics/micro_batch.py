"""MicroBatchSquares: the mean of squared micro-batch gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..memory.dtypes import compute_dtype
from ..memory.layout import real_view
from ..tracing import untraced
from .base import MissingSquares, Statistics
from .grad_version import GradVersion, weakly
from .replicas import Replicas


class MicroBatchSquares(Statistics):
    """Squares of the gradients of micro-batches, each taken as one sample.

    Batch-size invariant Adam (Wang and Aitchison, arXiv 2402.18824, algorithm 1), in which the
    second moment is the mean of squared micro-batch gradients. Works for any model and any
    parallelism, and costs two buffers of a parameter's size::

        statistics = fusedopt.MicroBatchSquares()
        optimizer = fusedopt.BatchDecoupledAdam(model.parameters(), statistics=statistics)
        for x, y in micro_batches:
            (criterion(model(x), y) / len(micro_batches)).backward()
            statistics.accumulate(optimizer)
        optimizer.step()
        optimizer.zero_grad()

    ``p.grad`` accumulates over micro-batches as ever. ``virtual_batch_size`` counts micro-batches.
    With several processes a micro-batch is that of all of them together: each has to be reduced, so
    that ``DistributedDataParallel.no_sync()`` must not be used.
    """

    def __init__(self) -> None:
        super().__init__("mean")
        self._states: dict[int, _Parameter] = {}
        self._replicas = Replicas()

    def count_of(self, parameter: Tensor) -> int:
        """Return how many micro-batches were gathered for a parameter."""
        state = self._states.get(id(parameter))
        return 0 if state is None else state.count

    @untraced
    @torch.no_grad()
    def accumulate(self, optimizer: Any) -> None:
        """Square the gradients that backward has made since the last call.

        Args:
            optimizer: whose parameters are meant.

        Raises:
            RuntimeError: where no parameter has a gradient, where none has changed since the last
                call, or where gradients are of one process alone.
        """
        own = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        if all(p.grad is None for p in own):
            raise RuntimeError(
                "no parameter has a gradient: call backward before accumulate(), under FSDP with"
                " gradient synchronisation on"
            )
        self._replicas.check(own)
        if any(id(p) in self._states and self._states[id(p)].is_cleared() for p in own):
            # By the model's zero_grad, or by hand.
            self.reset(own)
        states = [self._states.get(id(p)) for p in own if p.grad is not None]
        if all(state is not None and state.is_complete() for state in states):
            raise RuntimeError(
                "no gradient has changed since the last accumulate(): call it once, after each"
                " backward pass"
            )
        for p in own:
            if id(p) not in self._states:
                self._states[id(p)] = _kind(p)(p)
            self._states[id(p)].count += 1
            if p.grad is not None:
                self._states[id(p)].accumulate()

    def sum_of_squares(self, parameter: Tensor) -> Tensor | None:
        """Return the sum over micro-batches of squared gradients."""
        state = self._states.get(id(parameter))
        return None if state is None else state.squares

    def check(self, parameters: Sequence[Tensor]) -> None:
        """Raise where there are gradients that were not squared."""
        for p in parameters:
            state = self._states.get(id(p))
            if state is None or not state.is_complete():
                raise MissingSquares(
                    p,
                    "its gradient has changed since MicroBatchSquares saw it: call"
                    " statistics.accumulate(optimizer) after each backward, and to clip pass"
                    " clip=fusedopt.GlobalNorm(max_norm) to the optimizer",
                )

    def used(self, parameters: Sequence[Tensor]) -> None:
        """Note that a step has used what was gathered for some parameters."""
        for p in parameters:
            self._states[id(p)].stepped()

    def reset(self, parameters: Sequence[Tensor] | None = None) -> None:
        """Forget what was gathered; ``optimizer.zero_grad()`` calls this."""
        for key in list(self._states) if parameters is None else map(id, parameters):
            state = self._states.pop(key, None)
            if state is not None:
                state.remove()


_CHANGED = (
    "a gradient was written by hand between micro-batches, so that the last one cannot be told from"
    " the sum: change gradients after the last micro-batch only, and to clip, pass"
    " clip=fusedopt.GlobalNorm(max_norm) to the optimizer"
)


class _Parameter:
    """The squares of one parameter, and what is known of the micro-batches so far."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        self.squares: Tensor | None = None
        self.count = 0
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


class _Whole(_Parameter):
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


def _kind(parameter: Tensor) -> type[_Parameter]:
    """Choose by who writes the gradient."""
    if hasattr(parameter, "placements"):
        return _Summed
    # DistributedDataParallel with gradient_as_bucket_view=True.
    gradient = parameter.grad
    return _Bucketed if gradient is not None and gradient._is_view() else _Whole


class _Summed(_Parameter):
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
