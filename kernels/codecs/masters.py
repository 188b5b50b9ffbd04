"""A float32 master beside its bfloat16 parameter, in one or two bytes more.

The parameter is the master rounded to nearest; the remainder is the lower half of the master's bit
pattern as a signed integer. Where that is negative, the parameter was rounded up. In integers::

    parameter = (pattern + 0x8000) >> 16        pattern = (parameter << 16) + remainder

A remainder of 16 bits is all of the lower half, one of 8 bits the upper byte of it, to which the
pattern was rounded before: 24 bits of the 32. Arithmetic is on integers alone, so that a compiler
cannot contract or flush it. What holds of every one of the 2^32 patterns (``tools/patterns``):

* A finite master whose magnitude is below the largest bfloat16, 0x7F7F0000, comes back exactly from
  16 bits, and from 8 bits off by half a unit of 24 bits at most, or less than one unit where it was
  rounded stochastically.
* From there to the largest float32 a carry would end in infinity, and there are more patterns than
  codes with a finite parameter: 98,304 would show 0x7F7F, which has 65,536. So the parameter stays
  there, and the remainder is cut by one bit: off by less than two units of 32 bits, or of 24.
* The parameter is finite where the master is, infinite where it is, and nan where it is. A nan
  comes back as some nan.
* Ties go away from zero, where a cast sends them to even: that would take one code more than there
  are. What is rounded is the pattern that is kept, of 32 or of 24 bits.

And of every pair of a parameter and a remainder, also one that was never stored, since somebody
else may have written the parameter: the master read has the sign of the parameter, and is finite,
infinite or nan as it is. It is off from it by half a unit of bfloat16 at most (less than one unit
at the largest), and what is stored of it again is the same parameter, bit by bit unless nan.

Its twin in PyTorch is ``fusedopt/memory/masters.py``.
"""

from __future__ import annotations

from ..lang import jit, tl


@jit
def split(value, bits, REMAINDER: tl.constexpr):
    """Split a block into what is kept of it.

    Args:
        value: float32.
        bits: 32 random bits an element (uint32), of which an 8-bit remainder takes the upper 8 to
            round stochastically; None to round to nearest, ties to even.
        REMAINDER: ``tl.int16`` or ``tl.int8``.

    Returns:
        The parameter (bfloat16) and the remainder (of type REMAINDER).
    """
    # Bits of the lower half that are not kept.
    DROPPED: tl.constexpr = 16 - REMAINDER.primitive_bitwidth
    pattern = value.to(tl.uint32, bitcast=True)
    magnitude = pattern & 0x7FFFFFFF
    rounded = pattern
    if DROPPED == 8:
        if bits is None:
            rounded = tl.add(pattern, 0x7F + ((pattern >> 8) & 1), sanitize_overflow=False)
        else:
            rounded = tl.add(pattern, bits >> 24, sanitize_overflow=False)
    high = tl.add(rounded, 0x8000, sanitize_overflow=False) >> 16
    low = rounded >> DROPPED
    # No carry here: it would lead into infinity, and from a nan to zero.
    no_carry = magnitude >= 0x7F7F0000
    quiet = tl.where(magnitude > 0x7F800000, 0x40, 0).to(tl.uint32)
    high = tl.where(no_carry, (pattern >> 16) | quiet, high)
    low = tl.where(no_carry, (pattern & 0xFFFF) >> (DROPPED + 1), low)
    return high.to(tl.uint16).to(tl.bfloat16, bitcast=True), low.to(REMAINDER)


@jit
def join(parameter, remainder):
    """Read the master, float32, from a bfloat16 block and its remainder, int16 or int8."""
    high = parameter.to(tl.int16, bitcast=True).to(tl.int32) << 16
    low = remainder.to(tl.int32) << (16 - remainder.dtype.primitive_bitwidth)
    magnitude = high & 0x7FFFFFFF
    # Here the remainder was cut by one bit more, unless it is that of a smaller value, rounded up.
    low = tl.where(magnitude == 0x7F7F0000, low + tl.maximum(low, 0), low)
    # Two sums that are never stored: below zero is the other sign's nan, beyond infinity a nan.
    pattern = (high & -0x80000000) | tl.maximum(magnitude + low, 0)
    return tl.where(magnitude >= 0x7F800000, high, pattern).to(tl.float32, bitcast=True)
