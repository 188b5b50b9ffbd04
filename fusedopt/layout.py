"""Where tensors lie in memory, and whether a kernel that walks memory in order may touch them.

A kernel pairs the k-th element in memory of a parameter with the k-th of its gradient and states.
That is right only if all of them fill their memory without holes or overlaps and in the same
order of dimensions. Any other tensor is staged: copied into a buffer laid out like the parameter
before the update and, if it was written, copied back after it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes: the widest access of a thread


_dtype = operator.attrgetter("dtype")
_shape = operator.attrgetter("shape")


class Fingerprint:
    """Where tensors lie in memory, and what of them decides by which launch they are reached.

    Args:
        tensors: dense tensors of this process.

    Raises:
        RuntimeError: for sparse tensors, which have no address.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.addresses = list(map(Tensor.data_ptr, tensors))
        self._dtypes = list(map(_dtype, tensors))
        self._shapes = list(map(_shape, tensors))
        self._contiguous = list(map(Tensor.is_contiguous, tensors))
        self._strided = [i for i, plain in enumerate(self._contiguous) if not plain]
        self._strides = [tensors[i].stride() for i in self._strided]
        self._any_complex = any(t.is_complex() for t in tensors)
        self._routes = self._route(tensors, self.addresses)

    def fits(self, tensors: Sequence[Tensor], addresses: list[int], shapes: bool) -> bool:
        """Whether a launch prepared for the old tensors is right for these, but for addresses.

        This looks at a thousand tensors in every step and so reads no more than it must: strides
        only of tensors that are not contiguous, and shapes one by one, because a list of so many
        tuples would make Python's garbage collector start.

        Args:
            tensors: as many as before.
            addresses: where they are now.
            shapes: whether shapes can have changed at the old addresses. A gradient's cannot: it
                is refused by torch if it has not the parameter's.
        """
        if not (
            list(map(_dtype, tensors)) == self._dtypes
            and list(map(Tensor.is_contiguous, tensors)) == self._contiguous
            and [tensors[i].stride() for i in self._strided] == self._strides
        ):
            return False
        moved = addresses != self.addresses
        if (shapes or moved) and not all(map(operator.eq, map(_shape, tensors), self._shapes)):
            return False
        # A conjugate in the place of its original has the same address.
        if moved or self._any_complex:
            return self._route(tensors, addresses) == self._routes
        return True

    @staticmethod
    def _route(tensors: Sequence[Tensor], addresses: Sequence[int]) -> list[bool]:
        aligned = [address % ALIGNMENT == 0 for address in addresses]
        return aligned + [is_plain(t) for t in tensors]


def real_view(tensor: Tensor) -> Tensor:
    """View complex values as pairs of reals; real tensors are returned as they are.

    A lazily conjugated tensor has no such view and is copied.
    """
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a range of memory, each address used once, in any order."""
    expected = 1
    dims = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted(dim for dim in dims if dim[1] != 1):
        if stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether some dimension revisits the same address (an expanded tensor)."""
    return tensor.numel() > 0 and any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


def same_order(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of equal shape visit memory in the same order of dimensions."""
    # The stride of a dimension of size 1 says nothing.
    return all(
        i == j or size == 1 for i, j, size in zip(a.stride(), b.stride(), a.shape, strict=True)
    )


def is_plain(tensor: Tensor) -> bool:
    """Whether memory holds the values themselves, not their conjugates or negatives."""
    return not (tensor.is_conj() or tensor.is_neg())


def staging_buffer(parameter: Tensor, like: Tensor) -> Tensor:
    """Allocate a dense buffer in the parameter's order, for values of the type of ``like``."""
    if is_dense(parameter):
        return torch.empty_strided(
            parameter.shape, parameter.stride(), dtype=like.dtype, device=like.device
        )
    return torch.empty(parameter.shape, dtype=like.dtype, device=like.device)


def byte_range(tensor: Tensor) -> tuple[int, int]:
    """First address of the tensor's elements, and the first one behind them."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), tensor.data_ptr()
    extent = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.data_ptr(), tensor.data_ptr() + extent * tensor.element_size()
