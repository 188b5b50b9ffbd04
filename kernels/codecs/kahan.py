"""Kahan's compensation: beside a parameter, in its type, what rounding it has left over.

A rule computes with parameter + compensation in float32, and of its result x is stored::

    parameter' = round(x)        compensation' = round(x - parameter')

optimi adds the update u to the compensation instead, c = c + u, p' = p + c, c' = c + (p - p'), with
a rounding at each. With x = p + c + u that is the same but for these roundings: here x is float32,
x - p' is exact in float32, and only its rounding to the type of c' loses anything, 2^-9 of c' in
bfloat16. (In float16 the steps of c' are never finer than 2^-24, so that it holds nothing where
the parameter is below 2^-13.)

Two cases need a word. A compensation that is rounded up to half a unit of the parameter would lead
to a tie, and that to the neighbour: it is kept one step smaller, so that what is read rounds to the
parameter, and a step that updates nothing changes no bit. A compensation that does not round to the
parameter is thus none of its: somebody has written the parameter since, and it counts as zero. One
that by chance does is less than half a unit of the new parameter.

Beyond the largest finite value the parameter becomes infinite as with any cast, and there, as for
a nan, the compensation is zero. Its twin in PyTorch is ``fusedopt/memory/kahan.py``.
"""

from __future__ import annotations

from ..lang import jit, tl
from .cast import narrow, widen


@jit
def split(value, TYPE: tl.constexpr):
    """Split a float32 block into parameter and compensation, both of type TYPE."""
    parameter = narrow(value, TYPE)
    shown = widen(parameter, tl.float32)
    # Zeros where there is nothing to compensate, because infinity minus infinity is nan.
    finite = tl.abs(shown) < float("inf")
    shown = tl.where(finite, shown, 0.0)
    compensation = narrow(tl.where(finite, value, 0.0) - shown, TYPE)
    again = narrow(shown + widen(compensation, tl.float32), TYPE)
    moved = widen(again, tl.float32) != shown
    smaller = compensation.to(tl.uint16, bitcast=True) - moved.to(tl.uint16)
    return parameter, smaller.to(TYPE, bitcast=True)


@jit
def join(parameter, compensation):
    """Read in float32 what parameter and compensation, of one type, stand for."""
    value = widen(parameter, tl.float32)
    total = value + widen(compensation, tl.float32)
    again = narrow(total, parameter.dtype).to(tl.uint16, bitcast=True)
    # By their bits, so that -0 stays what it is.
    return tl.where(again == parameter.to(tl.uint16, bitcast=True), total, value)
