"""How programs share the tiles of a weight that are left over when each has had whole ones.

A tile takes ``positions`` of work, each a block of rows. The first ``whole`` tiles have a program
each; the positions of the others, one tile behind the other, are cut into equal shares, at most as
long as a tile. A share begins and ends anywhere, so that its one or two tiles are others' too; what
it has of them it writes as partial results, float32 tiles in slots of its own, which
``reduce_shares`` adds in the order of the positions (Stream-K, arXiv 2301.03598).

A share may end within a sample. Its square needs all of the sample's product, so that the part at
hand is written beside the sums. The share that goes on there takes the rest of the sample as a
piece of its own, whose total is the other part. Slots of a share, by tile:

    the rest of a sample: its product
    first tile: gradient, squares, begun sample where the share ends within one
    second tile: the same
"""

from __future__ import annotations

from ..lang import jit, tl
from .shapes import GROUP
from .tiles import split_tile, store_tile

# Elements and threads of a program of the reducing kernel.
REDUCE_BLOCK = 1024
REDUCE_THREADS = 128


@jit
def begin_of_share(share, shares, left, positions, unit):
    """Return where a share begins among ``left`` tiles' positions: at a multiple of ``unit``."""
    units = left.to(tl.int64) * (positions // unit)
    return share * units // shares * unit


@jit
def split_share(share, shares, left, positions, unit):
    """Return a share's first tile, where in that it begins, and how many positions it has."""
    begin = begin_of_share(share, shares, left, positions, unit)
    tile = begin // positions
    count = begin_of_share(share + 1, shares, left, positions, unit) - begin
    # At most those of a tile: in int32, which takes half the registers.
    return tile.to(tl.int32), (begin - tile * positions).to(tl.int32), count.to(tl.int32)


@jit
def store_piece(partials, acc, total, sums, share, steps, is_rest, is_begun, is_second):
    """Store what a share has of a tile's sums."""
    size: tl.constexpr = acc.shape[0] * acc.shape[1]
    o = tl.arange(0, acc.shape[0])
    i = tl.arange(0, acc.shape[1])
    slot = partials + first_slot(share, steps, is_rest, is_second) * size
    slot += o[:, None] * acc.shape[1] + i[None, :]
    if is_begun:
        total += acc
        if not is_rest:
            tl.store(slot + 2 * size, acc)
    tl.store(slot, total)
    if not is_rest:
        tl.store(slot + size, sums)


@jit
def first_slot(share, steps, is_rest, is_second):
    """Return the first slot of a share's piece, counted through all shares."""
    cuts = tl.where(steps > 1, 1, 0)
    return share * (4 + 2 * cuts) + tl.where(is_rest, 0, tl.where(is_second, cuts + 2, cuts))


@jit(do_not_specialize=["whole", "shares", "tiles", "positions", "unit", "steps"])
def reduce_shares(
    partials,  # float32 [shares, 6 where samples are cut, otherwise 4, BLOCK_O, BLOCK_I]
    gradient,  # [groups * outputs, inputs], written; or None
    squares,  # the same, written, or added to
    whole,
    shares,
    tiles,
    positions,  # of a tile
    unit,  # positions that are not cut
    steps,  # positions of a sample, where one may be cut; otherwise 1
    outputs,  # of a group
    inputs,
    ACCUMULATE: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the partial results of a block of one tile, always in the same order."""
    BLOCKS: tl.constexpr = BLOCK_O * BLOCK_I // BLOCK
    left = tl.program_id(0) // BLOCKS
    within = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    group, tile_o, tile_i = split_tile(whole + left, outputs, inputs, BLOCK_O, BLOCK_I, GROUP)
    row = tile_o * BLOCK_O + within // BLOCK_I
    column = tile_i * BLOCK_I + within % BLOCK_I
    where = (group * outputs + row).to(tl.int64) * inputs + column
    mask = (row < outputs) & (column < inputs)

    tiles -= whole
    at = left.to(tl.int64) * positions
    stop = at + positions
    # The last share that begins at this tile's first position or before it.
    units = tiles.to(tl.int64) * (positions // unit)
    share = ((at // unit + 1) * shares - 1) // units
    end = begin_of_share(share + 1, shares, tiles, positions, unit)
    is_second = begin_of_share(share, shares, tiles, positions, unit) < at
    total = tl.zeros((BLOCK,), tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    begun = tl.zeros((BLOCK,), tl.float32)
    size: tl.constexpr = BLOCK_O * BLOCK_I
    while at < stop:
        end = tl.minimum(end, stop)
        inside = at % steps
        if inside > 0 and end > at:
            part = tl.load(partials + first_slot(share, steps, True, False) * size + within)
            total += part
            begun += part
            at = tl.minimum(end, at - inside + steps)
            if at % steps == 0:
                sums += begun * begun
                begun = tl.zeros((BLOCK,), tl.float32)
        if at < end:
            slot = partials + first_slot(share, steps, False, is_second) * size + within
            total += tl.load(slot)
            sums += tl.load(slot + size)
            if end % steps > 0:
                begun = tl.load(slot + 2 * size)
            at = end
        share += 1
        is_second = False
        end = begin_of_share(share + 1, shares, tiles, positions, unit)
    store_tile(gradient, squares, total, sums, where, mask, ACCUMULATE)


# Below the kernels, whose lines are a part of their keys in Triton's cache.


def reduce_shares_constants(outputs: int, inputs: int, accumulate: bool) -> dict[str, object]:
    """State what ``reduce_shares`` is compiled for: whoever launches or compiles it asks here.

    Args:
        outputs: rows of a tile.
        inputs: columns of a tile.
        accumulate: whether squares are added to what is there.
    """
    return {
        "ACCUMULATE": accumulate,
        "BLOCK_O": outputs,
        "BLOCK_I": inputs,
        "GROUP": GROUP,
        "BLOCK": min(REDUCE_BLOCK, outputs * inputs),
    }
