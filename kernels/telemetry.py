"""Norms of gradient, parameter and update: partial sums of the pass that is made anyway.

Each program of the update kernel has all three at hand, and writes the sums of their squares over
its chunk: 12 bytes for 2,048 elements, and nothing is read besides. No order is left to chance, so
that equal steps give equal bits. The partial sums are added up when somebody asks for the norms.

    sums of a tensor: [chunks, 3], of gradient, parameter and update

The gradient is the one before clipping, without the loss scale; parameter and update are what the
rule returns and how far that is from what it was given, before either is rounded to what it is kept
in.
"""

from __future__ import annotations

from .lang import jit, tl

# Sums of a chunk: of gradient, parameter and update.
COUNT = 3
# What stands there until a step has written them: no square is below 0.
UNWRITTEN = -1.0
# The smallest chunk of a launch that measures, for less than 0.01 bytes an element.
SMALLEST_BLOCK = 2048
# Threads of such a launch, at most: more leave too few registers for codes.
MOST_THREADS = 512
# Of the kernel that adds up partial sums, in one turn.
BLOCK = 1024
THREADS = 256


@jit
def sums_at(column, width, chunk, control, ROW: tl.constexpr, COMPUTE: tl.constexpr):
    """Return where the sums of a chunk go, and what gradients are multiplied by before clipping."""
    # In int64 because a table can have many columns.
    begin = tl.load(column + ROW * width.to(tl.int64)).to(tl.pointer_type(COMPUTE))
    return begin + chunk * 3, tl.load(control + 2).to(COMPUTE)


@jit
def begin_sums(sums):
    """Set the sums of a chunk to zero, to which those of its parts are added."""
    for i in tl.static_range(3):
        tl.store(sums[0] + i, 0.0)


@jit
def put_sums(sums, gradient, before, after, mask, ADDS: tl.constexpr):
    """Write the sums of squares of gradient, parameter and update, or add them to what is there.

    The gradient is as it was read: its sum is brought into the true unit, not each element.
    """
    _put(sums[0], _squared(gradient, mask) * sums[1] * sums[1], ADDS)
    _put(sums[0] + 1, _squared(after, mask), ADDS)
    _put(sums[0] + 2, _squared(after - before, mask), ADDS)


@jit
def _squared(x, mask):
    """Sum the squares of the elements that there are."""
    if mask is not None:
        # Behind the last element a rule may make anything of nothing.
        x = tl.where(mask, x, 0.0)
    return tl.sum(x * x, 0)


@jit
def _put(pointer, total, ADDS: tl.constexpr):
    if ADDS:
        total += tl.load(pointer)
    tl.store(pointer, total)


@jit
def add_up(
    sums,  # [chunks of all tensors, 3]
    first,  # int64 [tensors + 1]: the first chunk of each tensor, and the number of all
    totals,  # float64 [tensors, 3], written
    BLOCK: tl.constexpr,
):
    """Add up the partial sums of each tensor, one program a tensor, in a fixed order."""
    tensor = tl.program_id(0)
    start = tl.load(first + tensor)
    stop = tl.load(first + tensor + 1)
    gradient = tl.zeros((BLOCK,), tl.float64)
    parameter = tl.zeros((BLOCK,), tl.float64)
    update = tl.zeros((BLOCK,), tl.float64)
    # A while loop: the interpreter of Triton 3.6 fails on range() with a run-time bound.
    while start < stop:
        chunk = start + tl.arange(0, BLOCK)
        there = chunk < stop
        gradient += tl.load(sums + chunk * 3, there, 0.0).to(tl.float64)
        parameter += tl.load(sums + chunk * 3 + 1, there, 0.0).to(tl.float64)
        update += tl.load(sums + chunk * 3 + 2, there, 0.0).to(tl.float64)
        start += BLOCK
    # In int64: there may be as many tensors as programs.
    total = totals + tensor.to(tl.int64) * 3
    tl.store(total, tl.sum(gradient, 0))
    tl.store(total + 1, tl.sum(parameter, 0))
    tl.store(total + 2, tl.sum(update, 0))


# Below the kernels, whose lines are a part of their keys in Triton's cache.


def add_up_constants() -> dict[str, object]:
    """State what ``add_up`` is compiled for: whoever launches or compiles it asks here."""
    return {"BLOCK": BLOCK}
