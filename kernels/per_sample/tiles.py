"""What kernels that own a tile of a weight's gradient share: order, loads, sums, stores."""

from __future__ import annotations

from ..codecs import decode, encode
from ..codecs.cast import widen
from ..lang import INTERPRETED, jit, tl

_INTERPRETED = INTERPRETED if tl is None else tl.constexpr(INTERPRETED)


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
def split_tile(
    tile, outputs, inputs, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """Return the group of a tile, and where in the weight of a group it lies, in tiles."""
    tiles_o = tl.cdiv(outputs, BLOCK_O)
    tiles_i = tl.cdiv(inputs, BLOCK_I)
    group = tile // (tiles_o * tiles_i)
    tile_o, tile_i = tile_of_program(tile % (tiles_o * tiles_i), tiles_o, tiles_i, GROUP)
    return group, tile_o, tile_i


@jit
def place_tile(
    group, tile_o, tile_i, outputs, inputs, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr
):  # fmt: skip
    """Return where the elements of a tile lie in a contiguous weight, and which it has."""
    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    row = (tl.zeros_like(tile_o) + group).to(tl.int64) * outputs + o[:, None]
    return row * inputs + i[None, :], (o < outputs)[:, None] & (i < inputs)[None, :]


@jit
def load_tile(pointers, mask):
    """Load a tile for a product, with zeros outside the mask."""
    return factor(tl.load(pointers, mask, 0.0))


@jit
def factor(value):
    """Return values as a product takes them."""
    if _INTERPRETED:
        # NumPy has no bfloat16, and would round a product of float16 to float16.
        return widen(value, tl.float32)
    else:
        return value


@jit
def add_sample(last, zero, acc, total, sums, GRADIENT: tl.constexpr):
    """At the end of a sample, add its product to one sum and the square of it to the other.

    ``zero`` is what the next product begins with.

    A branch and not a selection: a product that is used in every turn of the loop could not run on
    while the next turn is prepared. For the same reason nothing that loads depend on belongs here.
    """
    if last:
        if GRADIENT:
            total += acc
        sums += acc * acc
        acc = tl.zeros_like(acc) + zero
    return acc, total, sums


@jit
def zero_of(count, HIDDEN: tl.constexpr):
    """Return 0; hidden, so that the compiler cannot know it: ``count`` is at least 0.

    With wgmma it sets an accumulator to a constant by two instructions a register, through one
    of the registers that threads share, and to a value by one.
    """
    if HIDDEN:
        return (count < 0).to(tl.float32)
    else:
        return 0.0


@jit
def store_tile(gradient, squares, total, sums, offsets, mask, ACCUMULATE: tl.constexpr):
    """Store a tile of both results; the gradient is None where it is not wanted."""
    if gradient is not None:
        encode(gradient + offsets, total, mask)
    if ACCUMULATE:
        sums += decode(squares + offsets, mask, tl.float32)
    encode(squares + offsets, sums, mask)
