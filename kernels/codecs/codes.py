"""States in 8 bits, relative to the largest of their group.

A group is up to 128 consecutive elements; beside its codes stands one float32, a = max |x|::

    codec             for states     code                                            type
    signed            of any sign    sign and q of 0 ... 127, about a (q / 127)^3    int8
    unsigned          that are >= 0  q of 0 ... 255, about a (q / 255)^6             uint8
    float8            of any sign    e4m3, of which 448 stands for a                 e4m3
    positive float8   that are >= 0  the same without the sign                       e4m3

**The power codes** need no root. A float32's pattern, read as an integer, is its logarithm but for
a piecewise linear error, so that a multiple of it is nearly a power, and an integer division undoes
that exactly::

    level(q) = the float32 of the pattern  K (pattern(q) - pattern(N)) + pattern(1),   level(0) = 0

rises strictly to level(N) = 1. Where a code is found and its level with it, all is done on the
pattern of q itself: an element has some 70 instructions in the time that its bytes take, and a
conversion between integer and float counts for eight. **The float codes** have float32's layout,
but narrower: encoding cuts off the lower bits of a pattern, decoding puts zeros there. Beside
products and a quotient of float32, none of which is added to anything, both are arithmetic on
integers, so that every device and PyTorch get the same bits.

**Nothing is rounded to nearest.** An average moves by 1 - beta of the distance to its new value;
for beta = 0.999 that is a fraction of the distance of two codes, and it would never leave its code.
It is rounded up where it exceeds a threshold that walks through [0, 1) from step to step, by the
golden ratio from a place of the element's own, so that of any number of consecutive steps the right
share is rounded up. A draw anew at each step does so on average, with more noise:
docs/state_codes.md. The unsigned code takes what the threshold leaves of 1, which costs nothing:
with the same for both moments, single updates are longer. (Those of float codes are not.)

A state that is >= 0, and above it, is never read as 0: a second moment of 0 leaves eps as the
denominator, and one update is hundreds of times too long. A group of zeros has a = 0. With a nan or
an infinity in it a is nan, and so is all that is read of the group: neither goes unseen.

The twin in PyTorch is ``fusedopt/memory/codes.py``.
"""

from __future__ import annotations

from ..lang import divide, jit, tl

# Elements that share a scale.
GROUP = 128


@jit
def load(pointers, scales, mask, some, CODEC: tl.constexpr):
    """Load a block of codes and its scales, and decode it.

    Args:
        pointers: to the codes, ``[BLOCK]``.
        scales: pointers to the scales, ``[BLOCK // GROUP]``.
        mask: which codes there are, or None for all.
        some: which groups there are, or None for all.
        CODEC: one of the names above.

    Returns:
        float32 ``[BLOCK]``.
    """
    codes = tl.reshape(tl.load(pointers, mask), (scales.shape[0], 128))
    return tl.reshape(decode(codes, tl.load(scales, some), CODEC), pointers.shape)


@jit
def store(pointers, scales, value, mask, some, thresholds, CODEC: tl.constexpr):
    """Encode a float32 block, and store codes and scales: arguments as of ``load``."""
    if mask is not None:
        # What is no element has no say in the scale.
        value = tl.where(mask, value, 0.0)
    groups = tl.reshape(value, (scales.shape[0], 128))
    scale = group_scales(groups)
    codes = encode(groups, scale, tl.reshape(thresholds, groups.shape), CODEC)
    codes = tl.reshape(codes, pointers.shape).to(pointers.dtype.element_ty, bitcast=True)
    tl.store(pointers, codes, mask)
    tl.store(scales, scale, some)


@jit
def group_scales(value):
    """Return the scale of each group: the largest magnitude, or nan where one is not finite.

    Args:
        value: float32 ``[groups, GROUP]``.

    Returns:
        float32 ``[groups]``.
    """
    # Patterns of magnitudes are ordered as these are, and those of nan come last.
    pattern = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    return tl.where(pattern < 0x7F800000, pattern, 0x7FC00000).to(tl.float32, bitcast=True)


@jit
def encode(value, scale, thresholds, CODEC: tl.constexpr):
    """Encode groups.

    Args:
        value: float32 ``[groups, GROUP]``.
        scale: float32 ``[groups]``, of ``group_scales``.
        thresholds: uint32 ``[groups, GROUP]``, evenly spread.
        CODEC: one of the names above.

    Returns:
        int8 or uint8 ``[groups, GROUP]``; whatever it may be where the scale is nan.
    """
    # So that the inverse of a subnormal number is finite.
    raised = tl.where(scale < 2.0**-62, 2.0**64, 1.0)
    scale = tl.where(scale == 0.0, 1.0, scale * raised)
    inverse = divide(tl.full(scale.shape, 1.0, tl.float32), scale)
    share = tl.abs(value) * tl.expand_dims(raised, 1) * tl.expand_dims(inverse, 1)
    # In patterns: two units more, so that what was read of a code comes back as it in spite of two
    # roundings, and no more than 1.
    pattern = tl.minimum(share.to(tl.int32, bitcast=True) + 2, 0x3F800000)
    if CODEC == "signed":
        code = _encode_power(pattern, thresholds, True)
        return tl.where(value < 0.0, -code, code).to(tl.int8)
    elif CODEC == "unsigned":
        code = _encode_power(pattern, thresholds, False)
        return tl.where(value > 0.0, code, 0).to(tl.uint8)
    else:
        code = _encode_float8(pattern.to(tl.float32, bitcast=True), thresholds)
        if CODEC == "float8":
            return tl.where(value < 0.0, code | 0x80, code).to(tl.uint8)
        else:
            return tl.where(value > 0.0, tl.maximum(code, 1), 0).to(tl.uint8)


@jit
def decode(codes, scale, CODEC: tl.constexpr):
    """Decode groups: float32 ``[groups, GROUP]`` of codes and ``[groups]`` of scales."""
    scale = tl.expand_dims(scale, 1)
    if CODEC == "signed":
        wide = codes.to(tl.int32)
        found = _level(tl.abs(wide), True) * scale
        # Not the sign's bit put into the pattern before: registers run out on sm_100.
        return tl.where(wide < 0, -found, found)
    elif CODEC == "unsigned":
        wide = codes.to(tl.int32)
        return _above_zero(_level(wide, False) * scale, wide)
    else:
        wide = codes.to(tl.uint8, bitcast=True).to(tl.int32)
        # Exponents of a code count from -7, those of float32 from -127.
        pattern = (wide & 0x7F) << 20
        if CODEC == "float8":
            pattern |= (wide & 0x80) << 24
        found = pattern.to(tl.float32, bitcast=True) * (2.0**112 / 1.75) * scale
        return found if CODEC == "float8" else _above_zero(found, wide)


@jit
def _above_zero(value, code):
    """Keep a product above 0 from becoming 0."""
    pattern = value.to(tl.int32, bitcast=True)
    return tl.where((code > 0) & (pattern == 0), 1, pattern).to(tl.float32, bitcast=True)


@jit
def _level(code, SIGNED: tl.constexpr):
    """Return what a code from 0 to N stands for, relative to the scale."""
    POWER: tl.constexpr = 3 if SIGNED else 6
    TOP: tl.constexpr = 0x42FE0000 if SIGNED else 0x437F0000  # the patterns of 127 and 255
    # A code in the last bits of 2^23 is added to it: a float without a conversion.
    q = (code | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    pattern = (q.to(tl.int32, bitcast=True) - TOP) * POWER + 0x3F800000
    return tl.where(code > 0, pattern, 0).to(tl.float32, bitcast=True)


@jit
def _encode_power(pattern, thresholds, SIGNED: tl.constexpr):
    """Round shares of the largest, patterns up to that of 1, to codes of a power, int32.

    Without a sign none is below 1: what is 0 itself is looked at elsewhere.
    """
    POWER: tl.constexpr = 3 if SIGNED else 6
    TOP: tl.constexpr = 0x42FE0000 if SIGNED else 0x437F0000
    # The pattern of level(1).
    FIRST: tl.constexpr = (0x3F800000 - TOP) * POWER + 0x3F800000
    # The pattern of q, with all that is behind its point.
    found = 0x3F800000 + (tl.maximum(pattern - FIRST, 0).to(tl.uint32) // POWER).to(tl.int32)
    behind = 150 - (found >> 23)
    unit = 1 << behind
    code = ((found & 0x7FFFFF) | 0x800000) >> behind
    low = ((found & -unit) - TOP) * POWER + 0x3F800000
    high = low + unit * POWER
    if SIGNED:
        # Between 0 and level(1), where the code is 1. A choice of it costs ten registers.
        below = pattern < FIRST
        high = tl.where(below, low, high)
        low = tl.where(below, 0, low)
        code -= below.to(tl.int32)
    low = low.to(tl.float32, bitcast=True)
    high = high.to(tl.float32, bitcast=True)
    gap = high - low
    threshold = ((thresholds >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    share = pattern.to(tl.float32, bitcast=True)
    if SIGNED:
        return code + (share - low > threshold * gap).to(tl.int32)
    else:
        return code + (high - share < threshold * gap).to(tl.int32)


@jit
def _encode_float8(share, thresholds):
    """Round shares of the largest, float32, to codes of e4m3 without their sign, int32."""
    # What is smaller than the smallest normal code becomes a subnormal float32, whose bits are
    # those of the subnormal code.
    pattern = (share * 1.75 * 2.0**-112).to(tl.uint32, bitcast=True)
    return tl.minimum((pattern + (thresholds >> 12)) >> 20, 126).to(tl.int32)
