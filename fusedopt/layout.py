"""Where tensors lie in memory, and whether a kernel that walks memory in order may touch them.

A kernel pairs the k-th element in memory of a parameter with the k-th of its gradient and states.
That is right only if all of them fill their memory without holes or overlaps and in the same
order of dimensions. Any other tensor is staged: copied into a buffer laid out like the parameter
before the update and, if it was written, copied back after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes: the widest access of a thread

Fingerprint = tuple[list[int], list[Any], list[bool], list[tuple[int, ...]]]


def fingerprint(tensors: Sequence[Tensor], kind: Callable[[Tensor], Any]) -> Fingerprint:
    """What a prepared launch depends on, for tensors known to be the same objects or shapes.

    This runs over a thousand tensors at every step, so it reads no more than can have changed.
    Strides of all of them, for one, would be so many tuples that Python's garbage collector
    starts; a tensor that is contiguous still has the same ones.

    Args:
        tensors: any dense tensors of this process.
        kind: an attribute to read besides, such as the type or the size in bytes.

    Returns:
        Addresses, kinds, whether contiguous, and the strides of those that are not.

    Raises:
        RuntimeError: for sparse tensors.
    """
    contiguous = list(map(Tensor.is_contiguous, tensors))
    strided = () if all(contiguous) else zip(tensors, contiguous, strict=True)
    return (
        list(map(Tensor.data_ptr, tensors)),
        list(map(kind, tensors)),
        contiguous,
        [t.stride() for t, plain in strided if not plain],
    )


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
