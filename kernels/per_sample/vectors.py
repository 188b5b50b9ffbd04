"""Per-sample sums and squares of vector parameters: biases, gains of LayerNorm and RMSNorm.

Sample i's row is r_i[d] = sum over its positions t of e[t, d] for a bias, and of
e[t, d] * (x[t, d] - mean[t]) * rstd[t] for a gain. Wanted are sum_i r_i and sum_i r_i**2: the sum
over positions comes before the square. (The square before the sum is another statistic, that of
positions as samples.)

Two launches, no atomics, every sum in a fixed order. ``partial_sums`` reads the errors once. Its
programs divide the columns into blocks, and beyond that

* whole samples, where there are enough of them: a program leaves the sum of its samples' rows and
  the sum of their squares;
* otherwise the positions of each sample ("chunks"): a program leaves a part of one sample's row,
  which must not be squared yet.

``finish`` adds up what the programs left, and squares the rows in the second case.
"""

from __future__ import annotations

from ..codecs import decode, encode
from ..lang import jit, tl

# Elements that a program reads at once: with 128 threads, two 16-byte loads of each operand a
# thread in 16-bit types, four in float32. Gain and bias together need six accumulators.
TILE = 2048
THREADS = 128
# Columns of a tile: 256 bytes a row in 16-bit types, so that whole sectors are used.
BLOCK = 128
# Where positions are contiguous instead of columns (a convolution's channels).
STRIDED_BLOCK = 16

FINISH_ROWS = 128
FINISH_BLOCK = 32
FINISH_THREADS = 128


@jit(do_not_specialize=["count", "chunks", "samples_per_program"])
def partial_sums(
    e,  # [count, length, width] or [tokens, width]: gradient of the layer's output
    e_sample, e_row, e_column,  # its strides in elements; those of samples are 0 with offsets
    x,  # shaped like e: input of the normalisation, or None for a bias alone
    x_sample, x_row, x_column,
    mean,  # float32 [count, length] or [tokens], or None for RMSNorm
    rstd,  # float32, shaped like mean: reciprocal standard deviation, or of the root mean square
    norm_sample, norm_row,  # strides of both
    offsets,  # integer [count + 1]: where samples begin and end among the tokens, or None
    partials,  # float32 [parts, kinds, 1 or 2, width], written: rows, and unless CHUNKED squares
    width,
    count,
    # Positions a sample; unused with offsets. Multiples of 16 are a variant: with them accesses are
    # wide where positions are contiguous.
    length,
    chunks,  # programs that share a sample, where CHUNKED
    samples_per_program,  # otherwise
    BIAS: tl.constexpr,  # whether the bias is wanted (besides the gain, if x is given)
    ONE_STEP: tl.constexpr,  # whether no sample has more positions than a tile
    CHUNKED: tl.constexpr,
    SAMPLES: tl.constexpr,  # samples, positions and columns of a tile
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum the rows of a share of the samples, or a share of the positions of one sample.

    ``partials`` has the gain first, then the bias, where both are wanted.
    """
    blocks = tl.cdiv(width, BLOCK)
    part = tl.program_id(0) // blocks
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    wanted = columns < width
    if CHUNKED:
        sample = part // chunks
        last = sample + 1
    else:
        sample = part * samples_per_program
        last = tl.minimum(sample + samples_per_program, count)
    gain = tl.zeros((SAMPLES, BLOCK), tl.float32)
    gain_squares = tl.zeros((SAMPLES, BLOCK), tl.float32)
    bias = tl.zeros((SAMPLES, BLOCK), tl.float32)
    bias_squares = tl.zeros((SAMPLES, BLOCK), tl.float32)
    # While loops: the interpreter of Triton 3.6 fails on range() with a run-time bound.
    while sample < last:
        samples = sample + tl.arange(0, SAMPLES)
        origin, rows = _extent(offsets, samples, last, length)
        if CHUNKED:
            # Whole tiles, so that every chunk begins aligned where its sample does.
            share = tl.cdiv(tl.cdiv(rows, chunks), ROWS) * ROWS
            first = part % chunks * share
            stop = tl.minimum(first + share, rows)
        else:
            first = tl.zeros_like(rows)
            stop = rows
        samples = samples.to(tl.int64)
        gain_row = tl.zeros((SAMPLES, ROWS, BLOCK), tl.float32)
        bias_row = tl.zeros((SAMPLES, ROWS, BLOCK), tl.float32)
        step = 0
        # A bound known at compile time spares the registers of the loop.
        steps = 1 if ONE_STEP else tl.max(stop - first, 0)
        while step < steps:
            row = tl.multiple_of(first + step, ROWS)[:, None] + tl.arange(0, ROWS)[None, :]
            inside = row < stop[:, None]
            row = origin[:, None] + row
            mask = inside[:, :, None] & wanted[None, None, :]
            at = _address(e, samples, row, columns, e_sample, e_row, e_column)
            error = decode(at, mask, tl.float32)
            if BIAS:
                bias_row += tl.where(mask, error, 0.0)
            if x is not None:
                at = _address(x, samples, row, columns, x_sample, x_row, x_column)
                hat = decode(at, mask, tl.float32)
                at = samples[:, None] * norm_sample + row * norm_row
                if mean is not None:
                    hat -= tl.load(mean + at, inside, 0.0)[:, :, None]
                hat *= tl.load(rstd + at, inside, 0.0)[:, :, None]
                gain_row += tl.where(mask, error * hat, 0.0)
            step += ROWS
        if x is not None:
            r = tl.sum(gain_row, 1)
            gain += r
            gain_squares += r * r
        if BIAS:
            r = tl.sum(bias_row, 1)
            bias += r
            bias_squares += r * r
        sample += SAMPLES
    entries: tl.constexpr = 1 if CHUNKED else 2
    kinds: tl.constexpr = 2 if BIAS and x is not None else 1
    at = partials + part.to(tl.int64) * (kinds * entries) * width + columns
    if x is not None:
        _leave(at, width, gain, gain_squares, wanted, CHUNKED)
        at += entries * width
    if BIAS:
        _leave(at, width, bias, bias_squares, wanted, CHUNKED)


@jit
def _extent(offsets, samples, last, length):
    """First row (int64) and number of rows of each sample, 0 for those beyond the last."""
    if offsets is None:
        rows = tl.where(samples < last, length, 0)
        return tl.zeros_like(rows).to(tl.int64), rows
    else:
        begin = tl.load(offsets + samples, samples < last, 0)
        end = tl.load(offsets + samples + 1, samples < last, 0)
        return begin.to(tl.int64), (end - begin).to(tl.int32)


@jit
def _address(pointer, samples, row, columns, sample_stride, row_stride, column_stride):
    """Addresses of a tile [samples, rows, columns]; samples and rows are int64."""
    first = samples[:, None] * sample_stride + row * row_stride
    return pointer + first[:, :, None] + (columns.to(tl.int64) * column_stride)[None, None, :]


@jit
def _leave(at, width, total, squares, wanted, CHUNKED: tl.constexpr):
    tl.store(at, tl.sum(total, 0), wanted)
    if not CHUNKED:
        tl.store(at + width, tl.sum(squares, 0), wanted)


@jit(do_not_specialize=["count", "chunks"])
def finish(
    partials,  # float32 [count, chunks, kinds, 1 or 2, width]
    gain_gradient,  # [width], written; or None
    gain_squares,  # float32 [width], written or added to; None where the gain is not wanted
    bias_gradient,
    bias_squares,
    width,
    count,  # samples where CHUNKED, otherwise programs
    chunks,  # at most CHUNKS; 1 unless CHUNKED
    ADD_GAIN: tl.constexpr,  # whether squares are added to what is there
    ADD_BIAS: tl.constexpr,
    CHUNKED: tl.constexpr,
    SAMPLES: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up what ``partial_sums`` left; square each sample's row where that is still to do."""
    entries: tl.constexpr = 1 if CHUNKED else 2
    kinds: tl.constexpr = 2 if gain_squares is not None and bias_squares is not None else 1
    stride = width * (entries * kinds)
    if gain_squares is not None:
        _finish(
            partials, stride, gain_gradient, gain_squares, width, count, chunks,
            ADD_GAIN, CHUNKED, SAMPLES, CHUNKS, BLOCK,
        )  # fmt: skip
        partials += entries * width
    if bias_squares is not None:
        _finish(
            partials, stride, bias_gradient, bias_squares, width, count, chunks,
            ADD_BIAS, CHUNKED, SAMPLES, CHUNKS, BLOCK,
        )  # fmt: skip


@jit
def _finish(
    partials, stride, gradient, squares, width, count, chunks,
    ADD: tl.constexpr, CHUNKED: tl.constexpr,
    SAMPLES: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wanted = columns < width
    chunk = tl.arange(0, CHUNKS)
    total = tl.zeros((SAMPLES, BLOCK), tl.float32)
    total_squares = tl.zeros((SAMPLES, BLOCK), tl.float32)
    sample = 0
    while sample < count:
        samples = sample + tl.arange(0, SAMPLES)
        part = samples[:, None] * chunks + chunk[None, :]
        mask = (samples < count)[:, None] & (chunk < chunks)[None, :]
        mask = mask[:, :, None] & wanted[None, None, :]
        at = partials + (part.to(tl.int64) * stride)[:, :, None] + columns[None, None, :]
        row = tl.sum(tl.load(at, mask, 0.0), 1)
        total += row
        if CHUNKED:
            total_squares += row * row
        else:
            total_squares += tl.sum(tl.load(at + width, mask, 0.0), 1)
        sample += SAMPLES
    if gradient is not None:
        encode(gradient + columns, tl.sum(total, 0), wanted)
    result = tl.sum(total_squares, 0)
    if ADD:
        result += tl.load(squares + columns, wanted, 0.0)
    tl.store(squares + columns, result, wanted)


# Below the kernels, whose lines are a part of their keys in Triton's cache.


def finish_constants(
    add_gain: bool, add_bias: bool, chunked: bool, chunks: int
) -> dict[str, object]:
    """State what ``finish`` is compiled for: whoever launches or compiles it asks here.

    Args:
        add_gain: whether squares of the gain are added to what is there.
        add_bias: the same for the bias.
        chunked: whether programs share a sample.
        chunks: how many; a power of two, and 1 unless ``chunked``.
    """
    return {
        "ADD_GAIN": add_gain,
        "ADD_BIAS": add_bias,
        "CHUNKED": chunked,
        "SAMPLES": FINISH_ROWS // chunks,
        "CHUNKS": chunks,
        "BLOCK": FINISH_BLOCK,
    }
