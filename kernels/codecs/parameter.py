"""A parameter as a rule sees it, of what is kept of it: itself, and perhaps a companion."""

from __future__ import annotations

from ..lang import jit, tl
from . import kahan, masters
from .cast import narrow, widen
from .rounding import stochastic


@jit
def load(pointers, companions, mask, CODEC: tl.constexpr, COMPUTE: tl.constexpr):
    """Load a block in the compute type.

    Args:
        pointers: to the parameter.
        companions: to what is kept beside it; anything where nothing is.
        mask: as of ``tl.load``.
        CODEC: one of the names in ``format.py``.
        COMPUTE: the compute type.
    """
    p = tl.load(pointers, mask)
    if CODEC == "cast" or CODEC == "stochastic":
        return widen(p, COMPUTE)
    else:
        companion = tl.load(companions, mask)
        if CODEC == "kahan":
            return kahan.join(p, companion).to(COMPUTE)
        elif CODEC == "float32":
            # A parameter that is not the master's has been written by somebody else since.
            shown = narrow(companion, p.dtype).to(tl.uint16, bitcast=True)
            own = shown == p.to(tl.uint16, bitcast=True)
            return tl.where(own, companion, widen(p, tl.float32)).to(COMPUTE)
        else:
            return masters.join(p, companion).to(COMPUTE)


@jit
def store(pointers, companions, value, mask, bits, CODEC: tl.constexpr):
    """Store a block.

    Args:
        pointers: to the parameter.
        companions: as of ``load``.
        value: of the compute type.
        mask: as of ``tl.store``.
        bits: 32 random bits an element, where the codec draws.
        CODEC: one of the names in ``format.py``.
    """
    TYPE: tl.constexpr = pointers.dtype.element_ty
    if CODEC == "cast":
        tl.store(pointers, narrow(value, TYPE), mask)
    elif CODEC == "stochastic":
        tl.store(pointers, stochastic(value, bits, TYPE), mask)
    else:
        KEPT: tl.constexpr = companions.dtype.element_ty
        value = value.to(tl.float32)
        if CODEC == "kahan":
            p, companion = kahan.split(value, TYPE)
        elif CODEC == "float32":
            p, companion = narrow(value, TYPE), value
        elif CODEC == "remainder":
            p, companion = masters.split(value, None, KEPT)
        else:
            p, companion = masters.split(value, bits, KEPT)
        tl.store(pointers, p, mask)
        tl.store(companions, companion, mask)
