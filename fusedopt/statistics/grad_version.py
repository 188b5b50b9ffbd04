"""A gradient as it was at some moment, told from what it is now without being kept alive."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from ..tracing import untraced


def weakly(method: Callable[..., None]) -> Callable[..., None]:
    """Return a hook for a tensor that its owner holds: a cycle through autograd is for ever."""
    return partial(_call, weakref.WeakMethod(method))


@untraced
def _call(reference: Any, *arguments: Any) -> None:
    bound = reference()
    if bound is not None:
        bound(*arguments)


class GradVersion:
    """A gradient as it was at some moment: the tensor, and how often it had been written.

    A shard (DTensor) counts with its local tensor, which FSDP writes behind autograd's back.
    """

    def __init__(self, gradient: Tensor | None) -> None:
        # A gradient that is set to None is to be freed, so that it is not held. Not known by its
        # id, which the next gradient may well be given once this one is.
        self._mark = None if gradient is None else mark(_local(gradient))
        self._versions = None if gradient is None else _versions(gradient)

    def holds(self, gradient: Tensor | None) -> bool:
        """Whether the gradient is still that one, unwritten."""
        if gradient is None:
            return self._mark is None
        return self.is_same_tensor(gradient) and _versions(gradient) == self._versions

    def is_same_tensor(self, gradient: Tensor | None) -> bool:
        """Whether the gradient is still that tensor, written or not."""
        if gradient is None or self._mark is None:
            return False
        return mark_of(_local(gradient)) == self._mark

    def writes(self, gradient: Tensor | None) -> int:
        """Return how often the same tensor has been written since."""
        assert gradient is not None and self._versions is not None
        return _versions(gradient)[0] - self._versions[0]


_MARKS = itertools.count(1)


def mark(tensor: Tensor) -> int:
    """Return the number of a tensor, which no other tensor has; it is given one at first.

    A weak reference would say as much, but a tensor that has one cannot be swapped, as
    ``torch.__future__.set_swap_module_params_on_conversion`` does with gradients.
    """
    return int(tensor.__dict__.setdefault("_fusedopt_mark", next(_MARKS)))


def mark_of(tensor: Tensor) -> int | None:
    """Return the number that ``mark`` gave a tensor, or None."""
    return tensor.__dict__.get("_fusedopt_mark")


def _local(gradient: Any) -> Any:
    return getattr(gradient, "_local_tensor", gradient)


def _versions(gradient: Any) -> tuple[int, int]:
    return gradient._version, _local(gradient)._version
