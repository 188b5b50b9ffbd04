"""What kernels that own a tile of a weight's gradient share: order, loads, stores, reduction."""

from __future__ import annotations

from ..codecs import decode, encode
from ..lang import INTERPRETED, jit, tl

_INTERPRETED = INTERPRETED if tl is None else tl.constexpr(INTERPRETED)

# Elements and threads of a program of the reducing kernel.
REDUCE_BLOCK = 1024
REDUCE_THREADS = 128


@jit
def tile_of_program(program, tiles_o, tiles_i, GROUP: tl.constexpr):
    """Give programs that run at the same time tiles near each other: they read the same operands.

    Tiles are walked in stripes of GROUP along the outputs, so that the programs in flight cover
    a block of tiles that is as square as may be, and what they read stays in the L2 cache.
    """
    stripe = program // (GROUP * tiles_i)
    first = stripe * GROUP
    height = tl.minimum(tiles_o - first, GROUP)
    within = program % (GROUP * tiles_i)
    return first + within % height, within // height


@jit
def load_tile(pointers, mask):
    """Load a tile for a product, with zeros outside the mask."""
    value = tl.load(pointers, mask, 0.0)
    if _INTERPRETED and pointers.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    elif _INTERPRETED:
        # NumPy would round a product of float16 to float16.
        return value.to(tl.float32)
    else:
        return value


@jit
def add_sample(last, acc, total, sums, GRADIENT: tl.constexpr):
    """At the end of a sample, add its product to one sum and the square of it to the other.

    A branch and not a selection: a product that is used in every turn of the loop could not run on
    while the next turn is prepared. For the same reason nothing that loads depend on belongs here.
    """
    if last:
        if GRADIENT:
            total += acc
        sums += acc * acc
        acc = tl.zeros_like(acc)
    return acc, total, sums


@jit
def store_tile(gradient, squares, total, sums, offsets, mask, ACCUMULATE: tl.constexpr):
    """Store a tile of both results; the gradient is None where it is not wanted."""
    if gradient is not None:
        encode(gradient + offsets, total, mask)
    if ACCUMULATE:
        sums += decode(squares + offsets, mask, tl.float32)
    encode(squares + offsets, sums, mask)


@jit(do_not_specialize=["splits"])
def reduce_partials(
    partials,  # float32 [2 or 1, splits, numel]: of the gradient (if it is wanted), of the squares
    gradient,  # [numel], written; or None
    squares,  # [numel], written, or added to
    splits,
    numel,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum partial results over the splits, always in the same order."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    total = tl.zeros((BLOCK,), tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    source = partials + offsets
    size = splits.to(tl.int64) * numel
    split = 0
    while split < splits:
        if gradient is not None:
            total += tl.load(source, mask, 0.0)
            sums += tl.load(source + size, mask, 0.0)
        else:
            sums += tl.load(source, mask, 0.0)
        source += numel
        split += 1
    store_tile(gradient, squares, total, sums, offsets, mask, ACCUMULATE)


# Below the kernels, whose lines are a part of their keys in Triton's cache.


def reduce_partials_constants(accumulate: bool) -> dict[str, object]:
    """State what ``reduce_partials`` is compiled for: whoever launches or compiles it asks here."""
    return {"ACCUMULATE": accumulate, "BLOCK": REDUCE_BLOCK}
