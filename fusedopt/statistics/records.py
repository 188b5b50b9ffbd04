"""What is gathered for one parameter, and whether it still belongs to the gradient at hand."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor


def weakly(method: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """Return a hook for a tensor that its owner holds: a cycle through autograd is for ever."""
    reference = weakref.WeakMethod(method)

    def hook(tensor: Tensor) -> None:
        bound = reference()
        if bound is not None:
            bound(tensor)

    return hook


class Stamp:
    """A gradient as it was at some moment: the tensor, and how often it had been written."""

    def __init__(self, gradient: Tensor | None) -> None:
        # By identity, not by reference: a gradient that is set to None is to be freed.
        self._identity = None if gradient is None else (id(gradient), gradient._version)

    def holds(self, gradient: Tensor | None) -> bool:
        """Whether the gradient is still that one."""
        return self._identity == Stamp(gradient)._identity


class Record:
    """The squares of one parameter.

    Attributes:
        parameter: whose squares these are.
        name: its name in the model.
        squares: the sum over samples of squared contributions to ``parameter.grad``, in float32
            (float64 for float64 parameters); None where nothing has arrived.
        foreign: whether the parameter received a gradient that no observed layer made.
    """

    def __init__(self, parameter: Tensor, name: str) -> None:
        self.parameter = parameter
        self.name = name
        self.squares: Tensor | None = None
        self.foreign = False
        self._expected: list[tuple[Tensor | None, int] | None] = []
        self._stamp: Stamp | None = None
        self._stepped = False
        self._check_hook: Any = None
        self._arrived_hook: Any = None
        if parameter.requires_grad:
            self.watch()

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
        if not expected:
            self.foreign = True
        elif len(expected) == 1 and expected[0] is not None:
            tensor, version = expected[0]
            self.foreign |= gradient is not tensor or gradient._version != version

    def _arrived(self, parameter: Tensor) -> None:
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
        # Zeroed in place after a step is gone, too; before one it is an error, which step() finds.
        return self.parameter.grad is None or (self._stepped and self.is_changed())

    def is_changed(self) -> bool:
        """Whether the gradient was written or replaced since it arrived."""
        return self._stamp is not None and not self._stamp.holds(self.parameter.grad)

    def reset(self) -> None:
        """Forget the squares."""
        self.squares = None
        self.foreign = False
        self._expected = []
        self._stamp, self._stepped = None, False

    def remove(self) -> None:
        """Take the hooks off the parameter."""
        if self._check_hook is not None:
            self._check_hook.remove()
            self._arrived_hook.remove()
        self._check_hook = self._arrived_hook = None
