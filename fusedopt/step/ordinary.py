"""Tells without a close look that nothing can be wrong with most parameters and gradients.

What torch dispatches on says whether a tensor is sparse, nested, lazily negated, fake, or exists
within a transform alone. What a close look finds to be right for one tensor is right for all that
torch dispatches in the same way. A trait is asked of all tensors at once: tensor by tensor, in
Python, takes several times as long.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from ..memory.dtensor import dtensor_class, placed_alike
from ..memory.dtypes import STORABLE
from ..memory.storage import PLAIN

_SHAPE = operator.attrgetter("shape")
_DEVICE = operator.attrgetter("device")
_DTYPE = operator.attrgetter("dtype")
_SIZE = operator.attrgetter("nbytes")
_BITS = operator.methodcaller("raw_repr")


def find_doubtful(
    params: Sequence[Tensor],
    gradients: Sequence[Tensor],
    local_params: Sequence[Tensor],
    local_gradients: Sequence[Tensor],
) -> Iterator[int]:
    """Yield the positions of those that deserve a close look: what is right again is left out.

    Whoever takes the next position has found nothing wrong with the one before.

    Args:
        params: the parameters.
        gradients: one for each.
        local_params: what of them lies in this process.
        local_gradients: likewise.
    """
    fits = map(all, zip(
        _are_alike(params, gradients, local_params, local_gradients),
        map(operator.eq, map(_SHAPE, local_params), map(_SHAPE, local_gradients)),
        map(operator.eq, map(_DEVICE, local_params), map(_DEVICE, local_gradients)),
        _are_sound(local_params), _are_sound(local_gradients), strict=True,
    ))  # fmt: skip
    try:
        fine = list(fits)
    except RuntimeError:  # what some have not, a sparse tensor's storage say, can be asked of none
        fine = [False] * len(params)
    known: set[tuple[int, int]] = set()
    keys = zip(_keys(local_params), _keys(local_gradients), strict=True)
    for i, (is_fine, key) in enumerate(zip(fine, keys, strict=True)):
        if not is_fine or key not in known:
            yield i
            known.add(key)


def _are_alike(
    params: Sequence[Any], gradients: Sequence[Any], own: Sequence[Tensor], local: Sequence[Tensor]
) -> list[bool]:
    """Whether each is what it seems to be, or a part of tensors that are cut in the same way."""
    if own is params and local is gradients:
        return [True] * len(params)
    cut = dtensor_class()
    return [
        (type(p) is cut and type(x) is cut and placed_alike(p, x)) or (a is p and b is x)
        for p, x, a, b in zip(params, gradients, own, local, strict=True)
    ]


def _are_sound(tensors: Sequence[Tensor]) -> Iterator[bool]:
    """Whether each is plain, of a type that is stored, in one piece, and all of it in memory."""
    storages = map(UntypedStorage.nbytes, map(Tensor.untyped_storage, tensors))
    sizes = map(Tensor.element_size, tensors)
    starts = map(operator.mul, map(Tensor.storage_offset, tensors), sizes)
    ends = map(operator.add, starts, map(_SIZE, tensors))
    return map(all, zip(
        map(PLAIN.__contains__, map(type, tensors)),
        map(STORABLE.__contains__, map(_DTYPE, tensors)),
        map(Tensor.is_contiguous, tensors),
        map(operator.ge, storages, ends), strict=True,
    ))  # fmt: skip


def _keys(tensors: Sequence[Tensor]) -> Iterator[int]:
    return map(_BITS, map(torch._C._dispatch_keys, tensors))
