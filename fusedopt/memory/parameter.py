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
