"""Gradient and per-sample squares of a convolution's weight, in one pass over its operands.

With ``U_b`` the input patches under each output position of sample b, ``[positions, columns]``
where columns are C/g * KH * KW, and ``E_b`` the gradient of the output, ``[O/g, positions]``, it
contributes
``G_b = E_b U_b`` for each group; the squares are ``sum_b G_b * G_b``. The patches are gathered from
the input where they are multiplied: in memory they would take KH * KW times the input.
"""

from __future__ import annotations

from ..lang import INTERPRETED, jit, tl
from .shares import split_share, store_piece
from .tiles import add_sample, load_tile, place_tile, split_tile, store_tile, zero_of

_INTERPRETED = INTERPRETED if tl is None else tl.constexpr(INTERPRETED)


@jit(do_not_specialize=["whole", "shares", "row_blocks", "unit", "steps"])
def convolution_samples(
    x,  # [samples, groups * channels, height, width], any strides
    e,  # [samples, groups * outputs, positions], any strides
    gradient,  # [groups * outputs, columns], contiguous, written; or None; as in linear_samples
    squares,  # the same, written or added to
    partials,  # as in linear_samples, like the following
    whole,
    shares,
    row_blocks,  # of a tile, each BLOCK_ROWS output positions: what shares are counted in
    unit,
    steps,
    groups,
    outputs,  # of a group
    channels,  # of a group
    columns,  # channels * kernel_h * kernel_w
    height,
    width,
    positions,  # output height * out_width
    out_width,
    kernel_h,
    kernel_w,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    x_sample,  # strides in elements
    x_channel,
    x_row,
    x_column,
    e_sample,
    e_channel,
    e_position,
    PRECISION: tl.constexpr,  # of products of float32: "ieee" or "tf32"
    ACCUMULATE: tl.constexpr,
    INDEX: tl.constexpr,  # integer type that reaches every element of a sample
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    HIDE_ZERO: tl.constexpr,
):
    """Sum the samples' contributions and their squares, for one tile or for a share of some."""
    tiles = groups * tl.cdiv(outputs, BLOCK_O) * tl.cdiv(columns, BLOCK_I)
    if partials is None:
        group, tile_o, tile_i = split_tile(
            tl.program_id(0), outputs, columns, BLOCK_O, BLOCK_I, GROUP
        )  # fmt: skip
        _, total, sums = _sums(
            x, e, group, tile_o, tile_i, 0, row_blocks, outputs, channels, columns, height, width,
            positions, out_width, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w,
            dilation_h, dilation_w, x_sample, x_channel, x_row, x_column,
            e_sample, e_channel, e_position, gradient is not None,
            PRECISION, INDEX, BLOCK_O, BLOCK_I, BLOCK_ROWS, HIDE_ZERO,
        )  # fmt: skip
        store_tile(
            gradient, squares, total, sums,
            *place_tile(group, tile_o, tile_i, outputs, columns, BLOCK_O, BLOCK_I), ACCUMULATE,
        )  # fmt: skip
    else:
        share = tl.program_id(0)
        tile, first, count = split_share(share, shares, tiles - whole, row_blocks, unit)
        is_second = False
        while count > 0:
            # The rest of a sample is a piece of its own.
            is_rest = first % steps > 0
            stop = tl.minimum(first + count, row_blocks)
            stop = tl.where(is_rest, tl.minimum(stop, (first // steps + 1) * steps), stop)
            group, tile_o, tile_i = split_tile(
                whole + tile, outputs, columns, BLOCK_O, BLOCK_I, GROUP
            )  # fmt: skip
            acc, total, sums = _sums(
                x, e, group, tile_o, tile_i, first, stop, outputs, channels, columns, height, width,
                positions, out_width, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w,
                dilation_h, dilation_w, x_sample, x_channel, x_row, x_column,
                e_sample, e_channel, e_position, gradient is not None,
                PRECISION, INDEX, BLOCK_O, BLOCK_I, BLOCK_ROWS, HIDE_ZERO,
            )  # fmt: skip
            store_piece(
                partials, acc, total, sums, share, steps, is_rest, stop % steps > 0,
                is_second,
            )  # fmt: skip
            count -= stop - first
            is_second = stop == row_blocks
            tile = tl.where(is_second, tile + 1, tile)
            first = tl.where(is_second, 0, stop)


@jit
def _sums(
    x, e, group, tile_o, tile_i, first, stop, outputs, channels, columns, height, width,
    positions, out_width, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w,
    dilation_h, dilation_w, x_sample, x_channel, x_row, x_column,
    e_sample, e_channel, e_position, GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_ROWS: tl.constexpr, HIDE_ZERO: tl.constexpr,
):  # fmt: skip
    """Return a begun sample's product and the sums, of a tile's row blocks ``first:stop``.

    As in ``linear_samples``, one loop runs over the blocks of all samples.
    """
    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    column = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    mask_o = o < outputs
    mask_i = column < columns
    k = tl.arange(0, BLOCK_ROWS)
    steps = tl.cdiv(positions, BLOCK_ROWS)
    sample = first // steps
    position = (first - sample * steps) * BLOCK_ROWS

    # Which pixel of the patch a column is: the weight is [outputs, channels, kernel_h, kernel_w].
    channel = column // (kernel_h * kernel_w)
    shift_y = column // kernel_w % kernel_h * dilation_h - padding_h
    shift_x = column % kernel_w * dilation_w - padding_w
    x_tile = x + (group * channels).to(tl.int64) * x_channel
    x_tile = x_tile + channel[None, :].to(INDEX) * x_channel
    e_tile = e + (group * outputs).to(tl.int64) * e_channel
    e_tile = e_tile + o[:, None].to(INDEX) * e_channel + k[None, :] * e_position

    acc = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    sums = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    if _INTERPRETED:
        step = first
        while step < stop:
            acc, total, sums, sample, position = _position_block(
                x_tile, e_tile, mask_o, mask_i, k, shift_y, shift_x, acc, total, sums,
                sample, position, height, width, positions, out_width, stride_h, stride_w,
                x_sample, x_row, x_column, e_sample, e_position,
                GRADIENT, PRECISION, INDEX, BLOCK_ROWS, HIDE_ZERO,
            )  # fmt: skip
            step += 1
    else:
        # range() and not while: only its loads are pipelined.
        for _ in range(first, stop):
            acc, total, sums, sample, position = _position_block(
                x_tile, e_tile, mask_o, mask_i, k, shift_y, shift_x, acc, total, sums,
                sample, position, height, width, positions, out_width, stride_h, stride_w,
                x_sample, x_row, x_column, e_sample, e_position,
                GRADIENT, PRECISION, INDEX, BLOCK_ROWS, HIDE_ZERO,
            )  # fmt: skip
    return acc, total, sums


@jit
def _position_block(
    x_tile, e_tile, mask_o, mask_i, k, shift_y, shift_x, acc, total, sums,
    sample, position, height, width, positions, out_width, stride_h, stride_w,
    x_sample, x_row, x_column, e_sample, e_position,
    GRADIENT: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    HIDE_ZERO: tl.constexpr,
):  # fmt: skip
    """Multiply one block of positions; at the end of a sample, add its product and its square."""
    p = position + k
    mask_k = p < positions
    e_start = sample.to(tl.int64) * e_sample + position.to(tl.int64) * e_position
    e = load_tile(e_tile + e_start, mask_o[:, None] & mask_k[None, :])
    y = (p // out_width * stride_h)[:, None] + shift_y[None, :]
    x = (p % out_width * stride_w)[:, None] + shift_x[None, :]
    # Pixels of the padding are zeros that are not there.
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    pixel = y.to(INDEX) * x_row + x.to(INDEX) * x_column
    patch = load_tile(
        x_tile + sample.to(tl.int64) * x_sample + pixel, inside & mask_k[:, None] & mask_i[None, :]
    )
    acc = tl.dot(e, patch, acc, input_precision=PRECISION)
    position += BLOCK_ROWS
    last = position >= positions
    acc, total, sums = add_sample(last, zero_of(position, HIDE_ZERO), acc, total, sums, GRADIENT)
    position = tl.where(last, 0, position)
    sample = tl.where(last, sample + 1, sample)
    return acc, total, sums, sample, position
