"""Stochastic rounding, and the random bits that it takes.

Bits are a function of a key and of an element's index in the whole, unsharded parameter, so that
they are the same however it is cut up, and the key one of seed, parameter and step.

Two rounds of a permutation of 32 bits, with a key before each: x ^= x >> a; x *= b; x ^= x >> c;
x *= d; x ^= x >> e. The constants are the two sets of least bias in the list of C. Wellons'
hash-prospector (2018; 0.160 and 0.161, where a random permutation has 0.021). Two rounds pass the
tests of ``tests/memory/test_random_bits.py`` as Philox does, and one fails them. The keys are mixed
by the finaliser of splitmix64 (D. Stafford's variant 13, 2011; Steele, Lea and Flood 2014).

Its twin in PyTorch is ``fusedopt/memory/rounding.py``.
"""

from __future__ import annotations

from ..lang import jit, tl


@jit
def keys(seed, parameter, step):
    """Form the two keys of a parameter's step.

    Different triples have different keys, but for chance: where two of the three are equal, always.

    Args:
        seed: integer scalar, of which all 64 bits count.
        parameter: the parameter's number, an integer scalar.
        step: the step's number, an integer scalar.

    Returns:
        Two scalars, uint32.
    """
    state = _mix64(seed.to(tl.uint64))
    state = _mix64(state ^ parameter.to(tl.uint64))
    state = _mix64(state ^ step.to(tl.uint64))
    return state.to(tl.uint32), (state >> 32).to(tl.uint32)


@jit
def _mix64(x):
    """Permute the numbers of 64 bits. The increment is that of splitmix64: 0 is no fixed point."""
    # Hexadecimal literals above 2^63 are uint64.
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@jit
def random_bits(lower, upper, key0, key1):
    """Draw 32 random bits for each element.

    Args:
        lower: uint32 block, the lower halves of the elements' numbers in the whole parameter.
        upper: the upper halves, a block or a scalar.
        key0: uint32 scalar.
        key1: uint32 scalar.

    Returns:
        A block of uint32. For a key, the 2^32 numbers of an aligned range of indices are a
        permutation.
    """
    upper = tl.mul(upper, 0x9E3779B9, sanitize_overflow=False)
    x = _mix32(lower ^ key0, 15, 0xD168AAAD, 15, 0xAF723597, 15)
    x = x ^ tl.add(upper, key1, sanitize_overflow=False)
    return _mix32(x, 17, 0x9E485565, 16, 0xEF1D6B47, 16)


@jit
def scattered(x):
    """Map numbers of 32 bits one to one, so that those of neighbours are far apart."""
    x = tl.mul(x, 0x9E3779B1, sanitize_overflow=False)
    x = tl.mul(x ^ (x >> 15), 0x85EBCA77, sanitize_overflow=False)
    return x ^ (x >> 13)


@jit
def turned(bits):
    """Exchange the halves of 32 bits: what is rounded by the upper one first is independent."""
    return (bits << 16) | (bits >> 16)


@jit
def _mix32(
    x, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr, E: tl.constexpr
):  # fmt: skip
    """Permute the numbers of 32 bits."""
    x = tl.mul(x ^ (x >> A), B, sanitize_overflow=False)
    x = tl.mul(x ^ (x >> C), D, sanitize_overflow=False)
    return x ^ (x >> E)


@jit
def stochastic(value, bits, TYPE: tl.constexpr):
    """Round a block up or down to a neighbour, by chance, so that the mean is the value.

    Values that the type has are kept bit by bit; finite ones beyond its largest become the largest;
    infinities stay, and a nan stays some nan.

    The chances are exact, but for magnitudes below 2^-32 that become a float16: there they are cut
    to multiples of 2^-31, by which the mean is off by less than 2^-55.

    Args:
        value: float32, or float64, which is rounded to float32 first, to nearest.
        bits: 32 random bits an element (uint32), of which bfloat16 takes the upper 16, float16 the
            upper 13, and more where it is subnormal.
        TYPE: ``tl.bfloat16`` or ``tl.float16``.
    """
    pattern = value.to(tl.float32).to(tl.uint32, bitcast=True)
    magnitude = pattern & 0x7FFFFFFF
    INFINITY: tl.constexpr = 0x7F80 if TYPE == tl.bfloat16 else 0x7C00
    if TYPE == tl.bfloat16:
        rounded = tl.add(magnitude, bits >> 16, sanitize_overflow=False) >> 16
    else:
        rounded = _stochastic_float16(magnitude, bits)
    rounded = tl.minimum(rounded, INFINITY - 1)
    # A nan's bits may all lie in what is cut off: it becomes the quiet one.
    special = tl.where(magnitude > 0x7F800000, INFINITY | (INFINITY >> 1), INFINITY)
    rounded = tl.where(magnitude >= 0x7F800000, special, rounded)
    sign = (pattern >> 16) & 0x8000
    return (sign | rounded).to(tl.uint16).to(TYPE, bitcast=True)


@jit
def _stochastic_float16(magnitude, bits):
    """Round finite float32 patterns to those of float16, without an upper limit."""
    exponent = magnitude >> 23
    # The exponent's bias is 127 in one and 15 in the other, and a carry raises it as it should.
    normal = tl.add(magnitude, bits >> 19, sanitize_overflow=False) >> 13
    normal = tl.sub(normal, 112 << 10, sanitize_overflow=False)
    # Below 2^-14 the spacing stays 2^-24: of the significand, 126 - exponent bits are below it.
    below = 126 - tl.minimum(exponent, 112)
    # Those that no shift reaches are cut first; of zero and below 2^-126 nothing is left.
    cut = tl.minimum(tl.maximum(below, 31) - 31, 31)
    significand = ((magnitude & 0x7FFFFF) | 0x800000) >> cut
    below = tl.minimum(below, 31)
    subnormal = (significand + (bits >> (32 - below))) >> below
    return tl.where(exponent >= 113, normal, subnormal)
