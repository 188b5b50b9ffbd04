"""Gradient and per-sample squares of a linear layer's weight, in one pass over its operands.

With input A and gradient of the output E, sample b contributes ``G_b = E_b^T A_b``; the gradient is
``sum_b G_b`` and the squares are ``sum_b G_b * G_b``, elementwise. A program owns one tile of both
for all samples, so ``G_b`` lives in registers alone; tiles that are left over are shared
(``shares``). Samples of one row are another kernel's (``rows``).
"""

from __future__ import annotations

from ..lang import INTERPRETED, jit, tl
from .shares import split_share, store_piece
from .tiles import add_sample, factor, load_tile, place_tile, split_tile, store_tile, zero_of

_INTERPRETED = INTERPRETED if tl is None else tl.constexpr(INTERPRETED)


def has_tf32(amd: str | None) -> bool:
    """Say whether Triton compiles products in tf32 for a GPU.

    Args:
        amd: architecture of an AMD GPU (``gfx942``), with or without its features; None for a GPU
            that is not AMD's.
    """
    return amd is None or amd.partition(":")[0] == "gfx942"


@jit(do_not_specialize=["samples", "length", "whole", "shares", "positions", "unit", "steps"])
def linear_samples(
    a,  # [samples, length, inputs] or [tokens, inputs], any strides; or a descriptor of the former
    e,  # [samples, length, outputs] or [tokens, outputs], any strides; or a descriptor
    offsets,  # int [samples + 1]: where samples begin among the tokens; None where dense
    gradient,  # [outputs, inputs], contiguous, written; or None
    squares,  # [outputs, inputs], contiguous, written or added to
    partials,  # as in reduce_shares, written in their place; or None: a program has a whole tile
    samples,
    length,
    whole,  # tiles that are not shared: the first ones
    shares,  # programs that share the others
    positions,  # of a tile: row blocks; of segments, what _first_segment counts
    unit,  # positions that are not cut: those of a sample, or 1
    steps,  # positions of a sample, where one may be cut; otherwise 1
    outputs,
    inputs,
    a_sample,  # strides in elements
    a_row,
    a_column,
    e_sample,
    e_row,
    e_column,
    DESCRIBED: tl.constexpr,  # whether operands are descriptors [1, BLOCK_ROWS, BLOCK_I or BLOCK_O]
    PRECISION: tl.constexpr,  # of products of float32: "ieee" or "tf32"
    ACCUMULATE: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    HIDE_ZERO: tl.constexpr,
):
    """Sum the samples' contributions and their squares, for one tile or for a share of some."""
    tiles = tl.cdiv(outputs, BLOCK_O) * tl.cdiv(inputs, BLOCK_I)
    if partials is None:
        _, tile_o, tile_i = split_tile(
            tl.program_id(0), outputs, inputs, BLOCK_O, BLOCK_I, GROUP
        )  # fmt: skip
        _, total, sums = _sums(
            a, e, offsets, tile_o, tile_i, 0, positions, samples, length, positions,
            outputs, inputs, a_sample, a_row, a_column, e_sample, e_row, e_column,
            gradient is not None, DESCRIBED, PRECISION, HIDE_ZERO, BLOCK_O, BLOCK_I, BLOCK_ROWS,
        )  # fmt: skip
        store_tile(
            gradient, squares, total, sums,
            *place_tile(0, tile_o, tile_i, outputs, inputs, BLOCK_O, BLOCK_I), ACCUMULATE,
        )  # fmt: skip
    else:
        share = tl.program_id(0)
        tile, first, count = split_share(share, shares, tiles - whole, positions, unit)
        is_second = False
        while count > 0:
            # The rest of a sample is a piece of its own.
            is_rest = first % steps > 0
            stop = tl.minimum(first + count, positions)
            stop = tl.where(is_rest, tl.minimum(stop, (first // steps + 1) * steps), stop)
            _, tile_o, tile_i = split_tile(
                whole + tile, outputs, inputs, BLOCK_O, BLOCK_I, GROUP
            )  # fmt: skip
            acc, total, sums = _sums(
                a, e, offsets, tile_o, tile_i, first, stop, samples, length, positions,
                outputs, inputs, a_sample, a_row, a_column, e_sample, e_row, e_column,
                gradient is not None, DESCRIBED, PRECISION, HIDE_ZERO,
                BLOCK_O, BLOCK_I, BLOCK_ROWS,
            )  # fmt: skip
            store_piece(
                partials, acc, total, sums, share, steps, is_rest, stop % steps > 0,
                is_second,
            )  # fmt: skip
            count -= stop - first
            is_second = stop == positions
            tile = tl.where(is_second, tile + 1, tile)
            first = tl.where(is_second, 0, stop)


@jit
def _sums(
    a, e, offsets, tile_o, tile_i, first, stop, samples, length, positions,
    outputs, inputs, a_sample, a_row, a_column, e_sample, e_row, e_column,
    GRADIENT: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
    HIDE_ZERO: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Return a begun sample's product and the sums, of a tile's positions ``first:stop``.

    One loop runs over the row blocks of all samples, so that the loads of the next sample are under
    way while the last block of this one is multiplied; a loop per sample would empty the pipeline
    at every sample's end.
    """
    if offsets is None:
        steps = tl.cdiv(length, BLOCK_ROWS)
        sample = first // steps
        row = (first - sample * steps) * BLOCK_ROWS
        blocks = stop - first
        close = length
        next_close = length
    else:
        sample = _first_segment(offsets, samples, first, positions, BLOCK_ROWS)
        until = _first_segment(offsets, samples, stop, positions, BLOCK_ROWS)
        blocks = _blocks_of_segments(offsets, sample, until, BLOCK_ROWS)
        row = tl.load(offsets + sample)
        # A piece without samples must not read beyond the last offset.
        close = tl.load(offsets + tl.minimum(sample + 1, samples))
        next_close = tl.load(offsets + tl.minimum(sample + 2, samples))
    o = tl.arange(0, BLOCK_O)
    i = tl.arange(0, BLOCK_I)
    k = tl.arange(0, BLOCK_ROWS)
    mask_o = o < outputs - tile_o * BLOCK_O
    mask_i = i < inputs - tile_i * BLOCK_I
    if DESCRIBED:
        e_tile = e
        a_tile = a
    else:
        # int64: columns of a transposed operand are far apart. E is loaded as E^T: a transposition
        # between load and product would go through registers on sm_80.
        e_tile = e + (tile_o * BLOCK_O).to(tl.int64) * e_column
        e_tile += o[:, None] * e_column + k[None, :].to(tl.int64) * e_row
        a_tile = a + (tile_i * BLOCK_I).to(tl.int64) * a_column
        a_tile += k[:, None].to(tl.int64) * a_row + i[None, :] * a_column

    acc = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    sums = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    if _INTERPRETED:
        step = 0
        while step < blocks:
            acc, total, sums, sample, row, close, next_close = _row_block(
                a_tile, e_tile, offsets, tile_o, tile_i, mask_o, mask_i, k, acc, total, sums,
                sample, row, close, next_close, samples, a_sample, a_row, e_sample, e_row,
                GRADIENT, DESCRIBED, PRECISION, HIDE_ZERO, BLOCK_O, BLOCK_I, BLOCK_ROWS,
            )  # fmt: skip
            step += 1
    else:
        # range() and not while: only its loads are pipelined.
        for _ in range(0, blocks):
            acc, total, sums, sample, row, close, next_close = _row_block(
                a_tile, e_tile, offsets, tile_o, tile_i, mask_o, mask_i, k, acc, total, sums,
                sample, row, close, next_close, samples, a_sample, a_row, e_sample, e_row,
                GRADIENT, DESCRIBED, PRECISION, HIDE_ZERO, BLOCK_O, BLOCK_I, BLOCK_ROWS,
            )  # fmt: skip
    return acc, total, sums


@jit
def _row_block(
    a_tile, e_tile, offsets, tile_o, tile_i, mask_o, mask_i, k, acc, total, sums,
    sample, row, close, next_close, samples, a_sample, a_row, e_sample, e_row,
    GRADIENT: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
    HIDE_ZERO: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Multiply one block of rows; at the end of a sample, add its product and the square of it."""
    if DESCRIBED:
        # Rows beyond the sample's end are zeros: it is a dimension.
        e = e_tile.load([sample, row, tile_o * BLOCK_O])
        a = a_tile.load([sample, row, tile_i * BLOCK_I])
        e = factor(e).reshape(BLOCK_ROWS, BLOCK_O).T
        a = factor(a).reshape(BLOCK_ROWS, BLOCK_I)
    else:
        # Both operands are masked: 0 * inf, with an infinity of the next sample, would be nan.
        mask_k = k < close - row
        e_start = sample.to(tl.int64) * e_sample + row.to(tl.int64) * e_row
        a_start = sample.to(tl.int64) * a_sample + row.to(tl.int64) * a_row
        e = load_tile(e_tile + e_start, mask_o[:, None] & mask_k[None, :])
        a = load_tile(a_tile + a_start, mask_k[:, None] & mask_i[None, :])
    acc = tl.dot(e, a, acc, input_precision=PRECISION)
    row += BLOCK_ROWS
    last = row >= close
    acc, total, sums = add_sample(last, zero_of(row, HIDE_ZERO), acc, total, sums, GRADIENT)
    if offsets is None:
        row = tl.where(last, 0, row)
        sample = tl.where(last, sample + 1, sample)
    else:
        row = tl.where(last, close, row)
        sample = tl.where(last, sample + 1, sample)
        close = tl.where(last, next_close, close)
        next_close = tl.load(offsets + tl.minimum(sample + 2, samples))
    return acc, total, sums, sample, row, close, next_close


@jit
def _first_segment(offsets, samples, position, positions, BLOCK_ROWS: tl.constexpr):
    """Return the first segment that begins at a position or behind it.

    Segment s begins at ``offsets[s] // BLOCK_ROWS + s``: a position is about a row block, and an
    empty segment takes one, too.
    """
    # A tile's ends need no search, which waits for one load after the other.
    low = tl.where(position < positions, 0, samples)
    high = tl.where(position > 0, samples, 0)
    while low < high:
        middle = (low + high) // 2
        before = tl.load(offsets + middle) // BLOCK_ROWS + middle < position
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    return low


@jit
def _blocks_of_segments(offsets, first, stop, BLOCK_ROWS: tl.constexpr):
    """Count the row blocks of segments ``first:stop``; an empty segment takes one, all masked."""
    count = tl.zeros((256,), tl.int32)
    start = first
    while start < stop:
        index = start + tl.arange(0, 256)
        inside = index < stop
        begins = tl.load(offsets + index, inside, 0)
        ends = tl.load(offsets + index + 1, inside, 0)
        blocks = tl.maximum(tl.cdiv(ends - begins, BLOCK_ROWS), 1).to(tl.int32)
        count += tl.where(inside, blocks, 0)
        start += 256
    return tl.sum(count, 0)
