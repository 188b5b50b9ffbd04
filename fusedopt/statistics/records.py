"""What is gathered for one parameter, and whether it still belongs to the gradient at hand."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

if TYPE_CHECKING:
    from .passes import Pass


def weakly(method: Callable[..., None]) -> Callable[..., None]:
    """Return a hook for a tensor that its owner holds: a cycle through autograd is for ever."""
    reference = weakref.WeakMethod(method)

    def hook(*arguments: Any) -> None:
        bound = reference()
        if bound is not None:
            bound(*arguments)

    return hook


class Stamp:
    """A gradient as it was at some moment: the tensor, and how often it had been written.

    A shard (DTensor) counts with its local tensor, which FSDP writes behind autograd's back.
    """

    def __init__(self, gradient: Tensor | None) -> None:
        # Weakly: a gradient that is set to None is to be freed. Not by its id, which the next
        # gradient may well be given once this one is.
        self._tensor = None if gradient is None else TensorWeakRef(_local(gradient))
        self._versions = None if gradient is None else _versions(gradient)

    def holds(self, gradient: Tensor | None) -> bool:
        """Whether the gradient is still that one, unwritten."""
        if gradient is None:
            return self._tensor is None
        return self.is_same_tensor(gradient) and _versions(gradient) == self._versions

    def is_same_tensor(self, gradient: Tensor | None) -> bool:
        """Whether the gradient is still that tensor, written or not."""
        if gradient is None or self._tensor is None:
            return False
        return self._tensor() is _local(gradient)


def _local(gradient: Any) -> Any:
    return getattr(gradient, "_local_tensor", gradient)


def _versions(gradient: Any) -> tuple[int, int]:
    return gradient._version, _local(gradient)._version


class Record:
    """The squares of one parameter.

    What a backward pass makes is pending until autograd adds the gradient to ``parameter.grad``:
    ``torch.autograd.grad`` runs the same nodes and adds nothing.

    Args:
        parameter: whose squares these are.
        name: its name in the model.
        commit: called when a pending contribution has arrived.

    Attributes:
        squares: the sum over samples of squared contributions to ``parameter.grad``, in float32
            (float64 for float64 parameters); None where nothing has arrived.
        start: how many samples the statistics had seen when ``parameter.grad`` was cleared.
        reduced_count: number of samples of all processes, once squares are added up over them; 0
            before.
        foreign: whether the parameter received a gradient that no observed layer made.
    """

    def __init__(
        self, parameter: Tensor, name: str, commit: Callable[[Record, list[Pass]], None]
    ) -> None:
        self.parameter = parameter
        self.name = name
        self.squares: Tensor | None = None
        self.start = 0
        self.reduced_count = 0
        self.foreign = False
        # Whether the gradient was gone before the one that now arrives.
        self.restarts = False
        self._commit = commit
        self._pending: Tensor | None = None
        self._pending_calls: list[Pass] = []
        self._backward = -1
        self._expected: list[tuple[Tensor | None, int] | None] = []
        self._unexpected = False
        self._stamp: Stamp | None = None
        self._stepped = False
        self._check_hook: Any = None
        self._arrived_hook: Any = None
        if parameter.requires_grad:
            self.watch()

    def pending(self) -> Tensor | None:
        """Return what this backward pass has made so far, to be added to."""
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:
            self._backward = backward
            self._pending, self._pending_calls, self._expected = None, [], []
        return self._pending

    def propose(self, squares: Tensor, call: Pass) -> None:
        """Take the squares of a call of the model, which belong to a gradient on its way."""
        self._pending = squares
        self._pending_calls.append(call)

    def expect(self, gradient: Tensor | None, known: bool) -> None:
        """Note the gradient that an observed layer hands to autograd, if it is known."""
        version = 0 if gradient is None else gradient._version
        self._expected.append((gradient, version) if known else None)

    def watch(self) -> None:
        """See the gradient as it arrives, behind hooks that others have registered since."""
        registered = self.parameter._backward_hooks
        if self._check_hook is not None:
            if registered and next(reversed(registered)) == self._check_hook.id:
                return
            self.remove()
        self._check_hook = self.parameter.register_hook(weakly(self._check))
        arrived = weakly(self._arrived)
        self._arrived_hook = self.parameter.register_post_accumulate_grad_hook(arrived)

    def _check(self, gradient: Tensor) -> None:
        """Compare what reaches the parameter with what the layers handed over."""
        expected, self._expected = self._expected, []
        # One contribution is passed on as it is, several are added to a new tensor: in which the
        # layers' part cannot be told from a function that used the parameter directly.
        self._unexpected = not expected
        if len(expected) == 1 and expected[0] is not None:
            tensor, version = expected[0]
            self._unexpected = gradient is not tensor or gradient._version != version
        self.restarts = self.is_cleared()

    def _arrived(self, parameter: Tensor) -> None:
        """Run after autograd has added a gradient to ``parameter.grad``."""
        calls, self._pending_calls = self._pending_calls, []
        pending, self._pending = self._pending, None
        if pending is not None:
            self._commit(self, calls)
            self.squares = pending if self.squares is None else self.squares.add_(pending)
        self.foreign |= self._unexpected
        self._stamp, self._stepped = Stamp(parameter.grad), False

    def stepped(self) -> None:
        """Note that a step has used the squares."""
        self._stamp, self._stepped = Stamp(self.parameter.grad), True

    def accept(self) -> None:
        """Take the gradient as it is now for what the squares belong to."""
        self._stamp = Stamp(self.parameter.grad)

    def is_cleared(self) -> bool:
        """Whether the gradient that the squares belong to is gone."""
        if self.squares is None:
            return False
        gradient = self.parameter.grad
        if gradient is None or not self.is_changed():
            return gradient is None
        # Written after a step: zeroed in place, by the model's zero_grad or by hand. Written before
        # one: an error that step() finds, unless it was zeroed; this once the host looks.
        return self._stepped or not bool(gradient.any())

    def is_changed(self) -> bool:
        """Whether the gradient was written or replaced since it arrived."""
        return self._stamp is not None and not self._stamp.holds(self.parameter.grad)

    def reset(self, start: int) -> None:
        """Forget the squares; count samples from ``start`` on."""
        self.squares = None
        self.start = start
        self.reduced_count = 0
        self.foreign = False
        self._stamp, self._stepped = None, False

    def remove(self) -> None:
        """Take the hooks off the parameter."""
        if self._check_hook is not None:
            self._check_hook.remove()
            self._arrived_hook.remove()
        self._check_hook = self._arrived_hook = None
