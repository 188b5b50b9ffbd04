"""Which elements a program owns, and their numbers in the whole parameter.

A program's elements are BLOCK consecutive ones, or BLOCK // GROUP groups. Groups end where rows do:
in a tensor whose rows are no multiple of GROUP elements, the last of each row is short, and a
program walks groups instead of elements. So it does where a shard is cut along an inner dimension,
whose rows do not follow each other in the whole parameter.

Rows of the table behind the addresses, of tensors whose codecs draw::

    row 0    seed
    row 1    number of the parameter
    row 2    number of its first element here in the whole parameter

and of those that are walked row by row::

    row 3    elements of a row
    row 4    rows here that follow each other in the whole parameter
    row 5    how far apart the next such rows begin there
"""

from __future__ import annotations

from ..lang import jit, tl
from .rounding import keys, random_bits, scattered

GROUP = 128
DRAW_ROWS = 3
ROWWISE_ROWS = 6


@jit
def entry(column, width, ROW: tl.constexpr):
    """Read an entry of a tensor's column of the table."""
    return tl.load(column + ROW * width.to(tl.int64))


@jit
def numbered(column, width, chunk, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """Return of consecutive elements the numbers in the whole parameter, and their groups.

    Numbers are in two halves, uint32. In 64 bits they take twice the registers of all else.
    """
    groups = chunk * (BLOCK // 128) + tl.arange(0, BLOCK // 128)
    begin = chunk * BLOCK + entry(column, width, FIRST + 2)
    lower = tl.add(begin.to(tl.uint32), tl.arange(0, BLOCK).to(tl.uint32), sanitize_overflow=False)
    # Where the lower half has wrapped around, the upper one is the next.
    upper = (begin >> 32).to(tl.uint32) + (lower < begin.to(tl.uint32)).to(tl.uint32)
    return lower, upper, groups


@jit
def walk_rows(column, width, numel, chunk, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """Find a program's groups in a tensor that is walked row by row.

    Returns:
        Offsets in memory, int64 ``[BLOCK]``; which of them are elements; their numbers in the whole
        parameter, as of ``numbered``; the groups, int64 ``[BLOCK // 128]``, and which there are;
        and the element that offsets count from, None for the first.
    """
    inner = entry(column, width, FIRST + 3)
    follow = entry(column, width, FIRST + 4).to(tl.uint32)
    apart = entry(column, width, FIRST + 5)
    # There are less than 2^32 groups, since there are less than 2^31 programs: quotients of 64 bits
    # are functions, around which registers run out.
    a_row = ((inner + 127) // 128).to(tl.uint32)
    groups = (chunk * (BLOCK // 128)).to(tl.uint32) + tl.arange(0, BLOCK // 128).to(tl.uint32)
    row = groups // a_row
    within = (groups % a_row).to(tl.int64) * 128
    begin = row.to(tl.int64) * inner + within
    some = begin < numel
    lanes = tl.arange(0, 128)
    left = tl.where(some, inner - within, 0)
    mask = tl.expand_dims(lanes, 0) < tl.expand_dims(left, 1)
    offsets = tl.expand_dims(begin, 1) + tl.expand_dims(lanes, 0)
    there = (row // follow).to(tl.int64) * apart + (row % follow).to(tl.int64) * inner
    there += within + entry(column, width, FIRST + 2)
    index = tl.reshape(tl.expand_dims(there, 1) + tl.expand_dims(lanes, 0), (BLOCK,))
    return (
        tl.reshape(offsets, (BLOCK,)),
        tl.reshape(mask, (BLOCK,)),
        index.to(tl.uint32),
        (index >> 32).to(tl.uint32),
        groups.to(tl.int64),
        some,
        None,
    )


@jit
def draw(column, width, lower, upper, step, FIRST: tl.constexpr):
    """Draw 32 bits an element for a step: anew, and from the sequence of the element's own.

    Args:
        column: the tensor's column of the table.
        width: columns of the table.
        lower: numbers of the elements in the whole parameter, the lower halves.
        upper: the upper halves.
        step: number of the step.
        FIRST: the row of the table that holds the seed.

    Returns:
        Random bits; and thresholds that are spread evenly over any number of consecutive steps,
        by the golden ratio. Both uint32.
    """
    seed = entry(column, width, FIRST)
    number = entry(column, width, FIRST + 1)
    key0, key1 = keys(seed, number, step)
    bits = random_bits(lower, upper, key0, key1)
    # A start of each element's own is enough here: half as much mixing as of random bits.
    turns = (step * 0x9E3779B9 + seed * 0x85EBCA6B + number * 0xC2B2AE35).to(tl.uint32)
    start = lower ^ tl.mul(upper, 0x27D4EB2F, sanitize_overflow=False)
    thresholds = tl.add(scattered(start), turns, sanitize_overflow=False)
    return bits, thresholds
