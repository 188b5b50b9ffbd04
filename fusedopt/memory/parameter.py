"""The PyTorch twin of ``kernels/codecs/parameter.py``: a parameter as a rule sees it."""

from __future__ import annotations

import torch
from torch import Tensor

from . import kahan, masters
from .rounding import stochastic


def load(p: Tensor, companion: Tensor | None, codec: str) -> Tensor:
    """Read parameters in float32, of what is kept: for codecs with a companion.

    Args:
        p: bfloat16 or float16.
        companion: what is kept beside it.
        codec: one of the names in ``kernels/codecs/format.py``.
    """
    if companion is None:
        return p.float()
    if codec == "kahan":
        return kahan.join(p, companion)
    if codec == "float32":
        own = companion.to(p.dtype).view(torch.int16) == p.view(torch.int16)
        return torch.where(own, companion, p.float())
    return masters.join(p, companion)


def store(
    p: Tensor, companion: Tensor | None, value: Tensor, codec: str, bits: Tensor | None
) -> None:
    """Write parameters and what is kept beside them, in place.

    Args:
        p: bfloat16 or float16.
        companion: what is kept beside it.
        value: float32, or float64, which is rounded to float32 first.
        codec: one of the names in ``kernels/codecs/format.py``; no cast.
        bits: int32, 32 random bits an element, where the codec draws.
    """
    value = value.float()
    if companion is None:
        assert bits is not None
        p.copy_(stochastic(value, bits, p.dtype))
    elif codec == "float32":
        p.copy_(value)
        companion.copy_(value)
    else:
        if codec == "kahan":
            own, rest = kahan.split(value, p.dtype)
        else:
            own, rest = masters.split(value, companion.dtype, bits)
        p.copy_(own)
        companion.copy_(rest)


def beside(p: Tensor, value: Tensor, codec: str, dtype: torch.dtype) -> Tensor:
    """Return what to keep beside parameters, which stay as they are, so that values are read.

    Codecs round halves each in its own way: where one would round a value to the parameter's
    neighbour, the nearest that can stand beside the parameter is kept.

    Args:
        p: bfloat16 or float16, to within half a unit of the values.
        value: float32.
        codec: one with a companion.
        dtype: of the companion.
    """
    if codec == "float32":
        return torch.where(value.to(p.dtype) == p, value, torch.nextafter(value, p.float()))
    if codec == "kahan":
        return kahan.rest(value, p)
    own, rest = masters.split(value, dtype)
    there, here = (x.view(torch.int16).to(torch.int32) & 0x7FFF for x in (own, p))
    limits = torch.iinfo(dtype)
    rest = torch.where(there > here, limits.max, rest)
    return torch.where(there < here, limits.min, rest)
