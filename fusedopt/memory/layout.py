"""Where tensors lie in memory, and whether a kernel that walks memory in order may touch them.

A kernel pairs the k-th element in memory of a parameter with the k-th of its gradient and states.
That is right only if all of them fill their memory without holes or overlaps and in the same
order of dimensions. Any other tensor is staged: copied into a buffer laid out like the parameter
before the update and, if it was written, copied back after it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .storage import addresses as addresses_of

# A thousand tensors are compared with what a launch was prepared for, at every step. torch.compile
# does the same before it enters a compiled graph, in C++ and in a tenth of the time that attribute
# by attribute takes. It is not public, so its absence is provided for.
TensorGuards: Any
try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None

ALIGNMENT = 16  # bytes: the widest access of a thread


_BLOCK = 512

_SHAPE = operator.attrgetter("shape")
_SIZE = operator.attrgetter("nbytes")
_TYPE_AND_PLACE = operator.attrgetter("dtype", "device")


class Fingerprint:
    """Where tensors lie in memory, and what of them decides by which launch they are reached.

    Not how large a storage is: one that is cut short later, at the same address, is not seen.

    Raises:
        RuntimeError: for sparse tensors, which have no address.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.addresses = addresses_of(tensors)
        self._alignment = _alignment(self.addresses)
        self._alike = [_guard(some) for some in _blocks(tensors)]
        self._modes = _modes()

    def match(self, tensors: Sequence[Tensor]) -> list[int] | None:
        """Return where tensors are; None where a launch for the old ones is not right for them.

        Args:
            tensors: likewise.

        Raises:
            RuntimeError: for sparse tensors.
        """
        if len(tensors) != len(self.addresses):
            return None
        addresses: list[int] = []
        for some, are_alike in zip(_blocks(tensors), self._alike, strict=True):
            addresses += map(Tensor.data_ptr, some)
            if not are_alike(*some) and not self._match_without_modes(some, are_alike):
                return None
        if addresses != self.addresses:
            if _alignment(addresses) != self._alignment:
                return None
            # Memory may have been freed; an empty tensor, whose address is 0, never moves there.
            if addresses.count(0) != self.addresses.count(0):
                return None
        return addresses

    def _match_without_modes(self, some: Sequence[Tensor], are_alike: Callable[..., bool]) -> bool:
        # A guard also says no where a mode of torch is on that was off before, or off again.
        if [x.raw_repr() for x in _modes()] == [x.raw_repr() for x in self._modes]:
            return False
        with torch._C._ForceDispatchKeyGuard(*self._modes):
            return are_alike(*some)


def _modes() -> tuple[Any, Any]:
    """Return what this thread's modes add to what torch dispatches on, and what they take away."""
    return torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()


def _blocks(tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """Cut a list into pieces whose tensors stay in the processor's cache when looked at twice."""
    return [tensors[i : i + _BLOCK] for i in range(0, len(tensors), _BLOCK)]


def _alignment(addresses: Sequence[int]) -> list[bool]:
    return [address % ALIGNMENT == 0 for address in addresses]


def _guard(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Return a test for tensors of the same types, shapes, strides and flags."""
    if TensorGuards is None:
        traits = _traits(tensors)
        return lambda *others: _traits(others) == traits
    guards = TensorGuards(
        *tensors,
        dynamic_dims_sizes=list(map(list, map(_SHAPE, tensors))),
        dynamic_dims_strides=list(map(list, map(Tensor.stride, tensors))),
    )
    check: Callable[..., bool] = guards.check
    return check


def _traits(tensors: Sequence[Tensor]) -> list[object]:
    """List what decides about launches; by kind, since a tuple a tensor takes far longer."""
    found: list[object] = list(map(_TYPE_AND_PLACE, tensors))
    for read in (_SHAPE, Tensor.stride, Tensor.is_conj, Tensor.is_neg):
        found += map(read, tensors)
    return found


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


def are_in_one_order(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors of equal shape are plainly one row of values each, in the same order."""
    return all(map(Tensor.is_contiguous, tensors)) and not (
        any(map(Tensor.is_conj, tensors)) or any(map(Tensor.is_neg, tensors))
    )


def stacked_order(parameter: Tensor, samples: Tensor) -> bool:
    """Whether samples ``[batch, *shape]`` follow each other in memory, each in this order."""
    if len(samples) == 0:
        return True
    follow = samples.stride(0) == parameter.numel() or len(samples) == 1
    return follow and is_dense(samples[0]) and same_order(parameter, samples[0])


def stacked_buffer(parameter: Tensor, samples: Tensor) -> Tensor:
    """Allocate a buffer for samples in the parameter's order, one behind the other."""
    shape = (len(samples), *parameter.shape)
    strides = parameter.stride()
    if not is_dense(parameter):
        strides = torch.empty(parameter.shape, device="meta").stride()
    return torch.empty_strided(
        shape, (parameter.numel(), *strides), dtype=samples.dtype, device=samples.device
    )


def has_wide_rows(tensor: Tensor) -> bool:
    """Whether rows (the last dimension) are contiguous and start at multiples of 16 bytes."""
    *outer, last = tensor.stride()
    starts = [tensor.data_ptr(), *(stride * tensor.element_size() for stride in outer)]
    return last == 1 and all(start % ALIGNMENT == 0 for start in starts)


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
    if tensor.is_contiguous():
        start = tensor.data_ptr()
        return start, start + tensor.nbytes
    extent = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.data_ptr(), tensor.data_ptr() + extent * tensor.element_size()


def are_apart(tensors: Sequence[Tensor]) -> bool:
    """Whether no two tensors reach into each other's range of addresses."""
    if all(map(Tensor.is_contiguous, tensors)):
        starts = torch.tensor(list(map(Tensor.data_ptr, tensors)), device="cpu")
        stops = starts + torch.tensor(list(map(_SIZE, tensors)), device="cpu")
    else:
        starts, stops = torch.tensor([byte_range(t) for t in tensors], device="cpu").unbind(1)
    some = starts < stops
    starts, stops = starts[some].sort().values, stops[some].sort().values
    # Where ranges are apart, their ends are in the order of their beginnings.
    return bool((starts[1:] >= stops[:-1]).all())


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one device have some byte in common."""
    (a_start, a_stop), (b_start, b_stop) = byte_range(a), byte_range(b)
    if a_start >= b_stop or b_start >= a_stop:
        return False
    if is_dense(a) and is_dense(b):
        return True
    # Views that interleave, as the columns of one buffer do, are marked in a picture of it.
    start, unit = min(a_start, b_start), math.gcd(a.element_size(), b.element_size())
    unit = math.gcd(unit, a_start - b_start)
    marks = torch.zeros((max(a_stop, b_stop) - start) // unit, dtype=torch.bool, device="cpu")
    views = []
    for tensor, first in ((a, a_start), (b, b_start)):
        width = tensor.element_size() // unit
        strides = (*(stride * width for stride in tensor.stride()), 1)
        views.append(marks.as_strided((*tensor.shape, width), strides, (first - start) // unit))
    views[0].fill_(True)
    return bool(views[1].any())
