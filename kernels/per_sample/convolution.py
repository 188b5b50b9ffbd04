"""Gradient and per-sample squares of a convolution's weight, in one pass over its operands.

With ``U_b`` the input patches under each output position of sample b, ``[positions, columns]``
where columns are C/g * KH * KW, and ``E_b`` the gradient of the output, ``[O/g, positions]``, it
contributes
``G_b = E_b U_b`` for each group; the squares are ``sum_b G_b * G_b``. The patches are gathered from
the input where they are multiplied: in memory they would take KH * KW times the input.
"""

from __future__ import annotations

from ..lang import INTERPRETED, jit, tl
from .tiles import add_sample, load_tile, store_tile, tile_of_program

_INTERPRETED = INTERPRETED if tl is None else tl.constexpr(INTERPRETED)


@jit(do_not_specialize=["samples", "samples_of_split"])
def convolution_samples(
    x,  # [samples, groups * channels, height, width], any strides
    e,  # [samples, groups * outputs, positions], any strides
    gradient,  # [groups * outputs, columns], contiguous, written; or None; as in linear_samples
    squares,  # the same, written or added to
    samples,
    samples_of_split,
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
):
    """Sum the samples' contributions and their squares, for one tile of one group and one split.

    As in ``linear_samples``, one loop runs over the blocks of positions of all samples.
    """
    tiles_o = tl.cdiv(outputs, BLOCK_O)
    tiles_i = tl.cdiv(columns, BLOCK_I)
    tiles = tiles_o * tiles_i
    split = tl.program_id(0) // (tiles * groups)
    group = tl.program_id(0) // tiles % groups
    tile_o, tile_i = tile_of_program(tl.program_id(0) % tiles, tiles_o, tiles_i, GROUP)
    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    column = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    mask_o = o < outputs
    mask_i = column < columns
    k = tl.arange(0, BLOCK_ROWS)

    # Which pixel of the patch a column is: the weight is [outputs, channels, kernel_h, kernel_w].
    channel = column // (kernel_h * kernel_w)
    shift_y = column // kernel_w % kernel_h * dilation_h - padding_h
    shift_x = column % kernel_w * dilation_w - padding_w
    x_tile = x + (group * channels).to(tl.int64) * x_channel
    x_tile = x_tile + channel[None, :].to(INDEX) * x_channel
    e_tile = e + (group * outputs).to(tl.int64) * e_channel
    e_tile = e_tile + o[:, None].to(INDEX) * e_channel + k[None, :] * e_position

    sample = split * samples_of_split
    stop = tl.minimum(sample + samples_of_split, samples)
    blocks = (stop - sample) * tl.cdiv(positions, BLOCK_ROWS)
    position = sample * 0
    acc = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    sums = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    if _INTERPRETED:
        step = 0
        while step < blocks:
            acc, total, sums, sample, position = _position_block(
                x_tile, e_tile, mask_o, mask_i, k, shift_y, shift_x, acc, total, sums,
                sample, position, height, width, positions, out_width, stride_h, stride_w,
                x_sample, x_row, x_column, e_sample, e_position,
                gradient is not None, PRECISION, INDEX, BLOCK_ROWS,
            )  # fmt: skip
            step += 1
    else:
        # range() and not while: only its loads are pipelined.
        for _ in range(0, blocks):
            acc, total, sums, sample, position = _position_block(
                x_tile, e_tile, mask_o, mask_i, k, shift_y, shift_x, acc, total, sums,
                sample, position, height, width, positions, out_width, stride_h, stride_w,
                x_sample, x_row, x_column, e_sample, e_position,
                gradient is not None, PRECISION, INDEX, BLOCK_ROWS,
            )  # fmt: skip

    row = (split * groups + group).to(tl.int64) * outputs + o[:, None]
    mask = mask_o[:, None] & mask_i[None, :]
    store_tile(
        gradient, squares, total, sums, row * columns + column[None, :], mask, ACCUMULATE
    )  # fmt: skip


@jit
def _position_block(
    x_tile, e_tile, mask_o, mask_i, k, shift_y, shift_x, acc, total, sums,
    sample, position, height, width, positions, out_width, stride_h, stride_w,
    x_sample, x_row, x_column, e_sample, e_position,
    GRADIENT: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr, BLOCK_ROWS: tl.constexpr,
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
    acc, total, sums = add_sample(last, acc, total, sums, GRADIENT)
    position = tl.where(last, 0, position)
    sample = tl.where(last, sample + 1, sample)
    return acc, total, sums, sample, position
