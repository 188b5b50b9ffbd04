"""Gradient and per-sample squares of a linear layer's weight, where each row is a sample.

Sample b contributes ``G_b = e_b^T a_b``, whose square is ``(e_b * e_b)^T (a_b * a_b)``: the sum
over samples is a product, too (Goodfellow, arXiv 1510.01799; BackPACK, arXiv 1912.10985).
"""

from __future__ import annotations

from ..codecs.cast import narrow
from ..lang import INTERPRETED, jit, tl
from .shares import split_share, store_piece
from .tiles import factor, load_tile, place_tile, split_tile, store_tile

_INTERPRETED = INTERPRETED if tl is None else tl.constexpr(INTERPRETED)


@jit(do_not_specialize=["rows", "whole", "shares", "positions"])
def linear_rows(
    a,  # [rows, inputs], any strides
    e,  # [rows, outputs], any strides
    gradient,  # [outputs, inputs], contiguous, written; or None
    squares,  # [outputs, inputs], contiguous, written or added to
    partials,  # as in reduce_shares, written in their place; or None: a program has a whole tile
    rows,
    whole,  # as in linear_samples; a position is a row block
    shares,
    positions,
    outputs,
    inputs,
    a_row,  # strides in elements
    a_column,
    e_row,
    e_column,
    PRECISION: tl.constexpr,  # of products of float32: "ieee" or "tf32"
    ACCUMULATE: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``E^T A`` and ``(E * E)^T (A * A)`` from one read of both, for a tile or a share of some."""
    tiles = tl.cdiv(outputs, BLOCK_O) * tl.cdiv(inputs, BLOCK_I)
    if partials is None:
        _, tile_o, tile_i = split_tile(
            tl.program_id(0), outputs, inputs, BLOCK_O, BLOCK_I, GROUP
        )  # fmt: skip
        total, sums = _sums(
            a, e, tile_o, tile_i, 0, positions, rows, outputs, inputs,
            a_row, a_column, e_row, e_column,
            gradient is not None, PRECISION, BLOCK_O, BLOCK_I, BLOCK_ROWS,
        )  # fmt: skip
        store_tile(
            gradient, squares, total, sums,
            *place_tile(0, tile_o, tile_i, outputs, inputs, BLOCK_O, BLOCK_I), ACCUMULATE,
        )  # fmt: skip
    else:
        share = tl.program_id(0)
        tile, first, count = split_share(share, shares, tiles - whole, positions, 1)
        is_second = False
        while count > 0:
            stop = tl.minimum(first + count, positions)
            _, tile_o, tile_i = split_tile(
                whole + tile, outputs, inputs, BLOCK_O, BLOCK_I, GROUP
            )  # fmt: skip
            total, sums = _sums(
                a, e, tile_o, tile_i, first, stop, rows, outputs, inputs,
                a_row, a_column, e_row, e_column,
                gradient is not None, PRECISION, BLOCK_O, BLOCK_I, BLOCK_ROWS,
            )  # fmt: skip
            store_piece(partials, total, total, sums, share, 1, False, False, is_second)
            count -= stop - first
            is_second = stop == positions
            tile = tl.where(is_second, tile + 1, tile)
            first = tl.where(is_second, 0, stop)


@jit
def _sums(
    a, e, tile_o, tile_i, first, stop, rows, outputs, inputs, a_row, a_column, e_row, e_column,
    GRADIENT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Return both sums of a tile's row blocks ``first:stop``."""
    o = tl.arange(0, BLOCK_O)
    i = tl.arange(0, BLOCK_I)
    k = tl.arange(0, BLOCK_ROWS)
    mask_o = o < outputs - tile_o * BLOCK_O
    mask_i = i < inputs - tile_i * BLOCK_I
    # int64: columns of a transposed operand are far apart. E is loaded as E^T: a transposition
    # between load and product would go through registers on sm_80.
    e_tile = e + (tile_o * BLOCK_O).to(tl.int64) * e_column
    e_tile += o[:, None] * e_column + k[None, :].to(tl.int64) * e_row
    a_tile = a + (tile_i * BLOCK_I).to(tl.int64) * a_column
    a_tile += k[:, None].to(tl.int64) * a_row + i[None, :] * a_column
    total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    sums = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    row = first * BLOCK_ROWS
    end = tl.minimum(stop * BLOCK_ROWS, rows)
    if _INTERPRETED:
        while row < end:
            total, sums = _rows(
                a_tile, e_tile, mask_o, mask_i, k, total, sums, row, end, a_row, e_row,
                GRADIENT, PRECISION,
            )  # fmt: skip
            row += BLOCK_ROWS
    else:
        for start in range(row, end, BLOCK_ROWS):
            total, sums = _rows(
                a_tile, e_tile, mask_o, mask_i, k, total, sums, start, end, a_row, e_row,
                GRADIENT, PRECISION,
            )  # fmt: skip
    return total, sums


@jit
def _rows(
    a_tile, e_tile, mask_o, mask_i, k, total, sums, row, end, a_row, e_row,
    GRADIENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Multiply one block of rows, and the squares of it."""
    mask_k = k < end - row
    e = load_tile(e_tile + row.to(tl.int64) * e_row, mask_o[:, None] & mask_k[None, :])
    a = load_tile(a_tile + row.to(tl.int64) * a_row, mask_k[:, None] & mask_i[None, :])
    if GRADIENT:
        total = tl.dot(e, a, total, input_precision=PRECISION)
    is_narrow: tl.constexpr = e_tile.dtype.element_ty.primitive_bitwidth == 16
    sums = tl.dot(_square(e, is_narrow), _square(a, is_narrow), sums, input_precision=PRECISION)
    return total, sums


@jit
def _square(x, NARROW: tl.constexpr):
    """Square the rows of an operand, in float32; of a narrow one, round the squares to bfloat16.

    Its range is that of float32, where squares of float16 would underflow below 2^-12. A square
    keeps 8 of 22 (16) bits, rounded to nearest: of a sum of positive products, an error that is as
    often up as down. In tf32 the product would take twice the time of one in 16 bits.
    """
    x = x.to(tl.float32)
    x = x * x
    if NARROW:
        return factor(narrow(x, tl.bfloat16))
    else:
        return x
