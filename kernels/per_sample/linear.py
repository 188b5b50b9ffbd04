"""Gradient and per-sample squares of a linear layer's weight, in one pass over its operands.

With input A and gradient of the output E, sample b contributes ``G_b = E_b^T A_b``; the gradient is
``sum_b G_b`` and the squares are ``sum_b G_b * G_b``, elementwise. A program owns one tile of both
for all samples, so ``G_b`` lives in registers alone. Where a sample is a single row,
``G_b * G_b = (e_b * e_b)^T (a_b * a_b)``, so that the sum over samples is a product, too
(Goodfellow, arXiv 1510.01799; BackPACK, arXiv 1912.10985).

A sum that is split over programs is written as partial results: the kernels take float32
``[splits, outputs, inputs]`` in the place of gradient and squares, and split s writes the s-th.
"""

from __future__ import annotations

from ..lang import INTERPRETED, jit, tl
from .tiles import add_sample, load_tile, store_tile, tile_of_program

_INTERPRETED = INTERPRETED if tl is None else tl.constexpr(INTERPRETED)


def has_tf32(amd: str | None) -> bool:
    """Say whether Triton compiles products in tf32 for a GPU.

    Args:
        amd: architecture of an AMD GPU (``gfx942``), with or without its features; None for a GPU
            that is not AMD's.
    """
    return amd is None or amd.partition(":")[0] == "gfx942"


@jit(do_not_specialize=["samples", "length", "samples_of_split"])
def linear_samples(
    a,  # [samples, length, inputs] or [tokens, inputs], any strides
    e,  # [samples, length, outputs] or [tokens, outputs], any strides
    offsets,  # int [samples + 1]: where samples begin among the tokens; None where dense
    gradient,  # [outputs, inputs], contiguous, written; or None
    squares,  # [outputs, inputs], contiguous, written or added to
    samples,
    length,
    samples_of_split,
    outputs,
    inputs,
    a_sample,  # strides in elements
    a_row,
    a_column,
    e_sample,
    e_row,
    e_column,
    PRECISION: tl.constexpr,  # of products of float32: "ieee" or "tf32"
    ACCUMULATE: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Sum the samples' contributions and their squares, for one tile and one split of the samples.

    One loop runs over the row blocks of all samples, so that the loads of the next sample are under
    way while the last block of this one is multiplied; a loop per sample would empty the pipeline
    at every sample's end.
    """
    tiles_o = tl.cdiv(outputs, BLOCK_O)
    tiles_i = tl.cdiv(inputs, BLOCK_I)
    split = tl.program_id(0) // (tiles_o * tiles_i)
    program = tl.program_id(0) % (tiles_o * tiles_i)
    tile_o, tile_i = tile_of_program(program, tiles_o, tiles_i, GROUP)
    o = tl.arange(0, BLOCK_O)
    i = tl.arange(0, BLOCK_I)
    # int64: columns of a transposed operand are far apart.
    e += (tile_o * BLOCK_O).to(tl.int64) * e_column
    a += (tile_i * BLOCK_I).to(tl.int64) * a_column
    mask_o = o < outputs - tile_o * BLOCK_O
    mask_i = i < inputs - tile_i * BLOCK_I
    k = tl.arange(0, BLOCK_ROWS)
    # Loaded as E^T: a transposition between load and product would go through registers on sm_80.
    e_tile = e + (o[:, None] * e_column + k[None, :].to(tl.int64) * e_row)
    a_tile = a + (k[:, None].to(tl.int64) * a_row + i[None, :] * a_column)

    sample = split * samples_of_split
    stop = tl.minimum(sample + samples_of_split, samples)
    if offsets is None:
        blocks = (stop - sample) * tl.cdiv(length, BLOCK_ROWS)
        row = sample * 0
        end = length
        next_end = length
    else:
        blocks = _blocks_of_segments(offsets, sample, stop, BLOCK_ROWS)
        row = tl.load(offsets + sample)
        # A split without samples must not read beyond the last offset.
        end = tl.load(offsets + tl.minimum(sample + 1, samples))
        next_end = tl.load(offsets + tl.minimum(sample + 2, samples))

    acc = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    sums = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    if _INTERPRETED:
        step = 0
        while step < blocks:
            acc, total, sums, sample, row, end, next_end = _row_block(
                a_tile, e_tile, offsets, mask_o, mask_i, k, acc, total, sums,
                sample, row, end, next_end, samples, a_sample, a_row, e_sample, e_row,
                gradient is not None, PRECISION, BLOCK_ROWS,
            )  # fmt: skip
            step += 1
    else:
        # range() and not while: only its loads are pipelined.
        for _ in range(0, blocks):
            acc, total, sums, sample, row, end, next_end = _row_block(
                a_tile, e_tile, offsets, mask_o, mask_i, k, acc, total, sums,
                sample, row, end, next_end, samples, a_sample, a_row, e_sample, e_row,
                gradient is not None, PRECISION, BLOCK_ROWS,
            )  # fmt: skip

    rows_o = tile_o * BLOCK_O + o
    columns_i = tile_i * BLOCK_I + i
    where = (split.to(tl.int64) * outputs + rows_o[:, None]) * inputs + columns_i[None, :]
    mask = mask_o[:, None] & mask_i[None, :]
    store_tile(gradient, squares, total, sums, where, mask, ACCUMULATE)


@jit
def _row_block(
    a_tile, e_tile, offsets, mask_o, mask_i, k, acc, total, sums,
    sample, row, end, next_end, samples, a_sample, a_row, e_sample, e_row,
    GRADIENT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Multiply one block of rows; at the end of a sample, add its product and the square of it."""
    # Both operands are masked: 0 * inf, with an infinity of the next sample, would be nan.
    mask_k = k < end - row
    e_start = sample.to(tl.int64) * e_sample + row.to(tl.int64) * e_row
    a_start = sample.to(tl.int64) * a_sample + row.to(tl.int64) * a_row
    e = load_tile(e_tile + e_start, mask_o[:, None] & mask_k[None, :])
    a = load_tile(a_tile + a_start, mask_k[:, None] & mask_i[None, :])
    acc = tl.dot(e, a, acc, input_precision=PRECISION)
    row += BLOCK_ROWS
    last = row >= end
    acc, total, sums = add_sample(last, acc, total, sums, GRADIENT)
    if offsets is None:
        row = tl.where(last, 0, row)
        sample = tl.where(last, sample + 1, sample)
    else:
        row = tl.where(last, end, row)
        sample = tl.where(last, sample + 1, sample)
        end = tl.where(last, next_end, end)
        next_end = tl.load(offsets + tl.minimum(sample + 2, samples))
    return acc, total, sums, sample, row, end, next_end


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


@jit(do_not_specialize=["rows", "rows_of_split"])
def linear_rows(
    a,  # [rows, inputs], any strides
    e,  # [rows, outputs], any strides
    gradient,  # as in linear_samples
    squares,
    rows,
    rows_of_split,
    outputs,
    inputs,
    a_row,
    a_column,
    e_row,
    e_column,
    PRECISION: tl.constexpr,  # of products of float32: "ieee" or "tf32"
    SQUARE_PRECISION: tl.constexpr,  # of products of squares, which are float32 always
    ACCUMULATE: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``E^T A`` and ``(E * E)^T (A * A)`` from one read of both: each row is a sample."""
    tiles_o = tl.cdiv(outputs, BLOCK_O)
    tiles_i = tl.cdiv(inputs, BLOCK_I)
    split = tl.program_id(0) // (tiles_o * tiles_i)
    program = tl.program_id(0) % (tiles_o * tiles_i)
    tile_o, tile_i = tile_of_program(program, tiles_o, tiles_i, GROUP)
    o = tl.arange(0, BLOCK_O)
    i = tl.arange(0, BLOCK_I)
    e += (tile_o * BLOCK_O).to(tl.int64) * e_column
    a += (tile_i * BLOCK_I).to(tl.int64) * a_column
    mask_o = o < outputs - tile_o * BLOCK_O
    mask_i = i < inputs - tile_i * BLOCK_I
    k = tl.arange(0, BLOCK_ROWS)
    # Loaded as E^T: a transposition between load and product would go through registers on sm_80.
    e_tile = e + (o[:, None] * e_column + k[None, :].to(tl.int64) * e_row)
    a_tile = a + (k[:, None].to(tl.int64) * a_row + i[None, :] * a_column)

    row = split * rows_of_split
    stop = tl.minimum(row + rows_of_split, rows)
    total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    sums = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    if _INTERPRETED:
        while row < stop:
            total, sums = _rows(
                a_tile, e_tile, mask_o, mask_i, k, total, sums, row, stop, a_row, e_row,
                gradient is not None, PRECISION, SQUARE_PRECISION,
            )  # fmt: skip
            row += BLOCK_ROWS
    else:
        for start in range(row, stop, BLOCK_ROWS):
            total, sums = _rows(
                a_tile, e_tile, mask_o, mask_i, k, total, sums, start, stop, a_row, e_row,
                gradient is not None, PRECISION, SQUARE_PRECISION,
            )  # fmt: skip

    rows_o = tile_o * BLOCK_O + o
    columns_i = tile_i * BLOCK_I + i
    where = (split.to(tl.int64) * outputs + rows_o[:, None]) * inputs + columns_i[None, :]
    mask = mask_o[:, None] & mask_i[None, :]
    store_tile(gradient, squares, total, sums, where, mask, ACCUMULATE)


@jit
def _rows(
    a_tile, e_tile, mask_o, mask_i, k, total, sums, row, stop, a_row, e_row,
    GRADIENT: tl.constexpr, PRECISION: tl.constexpr, SQUARE_PRECISION: tl.constexpr,
):  # fmt: skip
    """Multiply one block of rows, and the squares of it."""
    mask_k = k < stop - row
    e = load_tile(e_tile + row.to(tl.int64) * e_row, mask_o[:, None] & mask_k[None, :])
    a = load_tile(a_tile + row.to(tl.int64) * a_row, mask_k[:, None] & mask_i[None, :])
    if GRADIENT:
        total = tl.dot(e, a, total, input_precision=PRECISION)
    # Squares of float16 would underflow below 2^-12, those of bfloat16 keep 8 bits: they are formed
    # in float32. tf32 has its range, and of the 22 (16) bits of a square it keeps 11.
    e = e.to(tl.float32)
    a = a.to(tl.float32)
    sums = tl.dot(e * e, a * a, sums, input_precision=SQUARE_PRECISION)
    return total, sums
