"""The cast: memory holds a floating type, to which a block is rounded to nearest, ties to even.

Its twin in PyTorch is ``fusedopt/memory/dtypes.py``.
"""

from __future__ import annotations

from ..lang import INTERPRETED, jit, tl

# The interpreter's own conversions truncate to bfloat16, and flush its subnormal numbers.
_INTERPRETED = INTERPRETED if tl is None else tl.constexpr(INTERPRETED)


@jit
def decode(pointers, mask, COMPUTE: tl.constexpr):
    """Load a block and widen it to the compute type."""
    return widen(tl.load(pointers, mask), COMPUTE)


@jit
def encode(pointers, value, mask):
    """Round a block to the type that the pointers point to, and store it."""
    tl.store(pointers, narrow(value, pointers.dtype.element_ty), mask)


@jit
def encode_positive(pointers, value, mask):
    """Do so, but keep what is above 0 there: float16 has nothing below 6e-8."""
    # 2^-24, its smallest number.
    encode(pointers, tl.where(value > 0.0, tl.maximum(value, 5.9604644775390625e-08), value), mask)


@jit
def widen(value, COMPUTE: tl.constexpr):
    """Convert a block to a type that has all of its values."""
    if _INTERPRETED and value.dtype == tl.bfloat16:
        bits = value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True).to(COMPUTE)
    else:
        return value.to(COMPUTE)


@jit
def narrow(value, TYPE: tl.constexpr):
    """Round a block to a type: to nearest, ties to even."""
    if _INTERPRETED and TYPE == tl.bfloat16:
        return _round_to_bfloat16(value)
    else:
        return value.to(TYPE)


@jit
def _round_to_bfloat16(value):
    """Round to nearest, ties to even, as the hardware does."""
    bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    # Adding to the pattern of a nan can carry it into infinity: keep it, and set a mantissa bit.
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    rounded = tl.where(is_nan, bits | 0x00400000, rounded)
    return (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


def compute_type(types):
    """Return the type that arithmetic on operands of these element types is done in."""
    return tl.float64 if tl.float64 in types else tl.float32
