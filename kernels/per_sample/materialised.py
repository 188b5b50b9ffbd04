"""Per-sample gradients that lie in memory: reduced in one pass, or reduced and used in one.

Samples are ``[batch, *param]`` and come in one tensor or several (parts). A program owns a chunk of
the parameter and walks all samples of it, so that each byte is read once, sums stay in registers
and nothing depends on the order in which programs run. ``update_from_samples`` goes on to moving
averages, bias correction and update: neither mean nor mean square reaches memory.

The table of addresses is that of ``kernels/multi_tensor.py``, with one row a part in the place of
the rows of inputs.
"""

from __future__ import annotations

from ..codecs import compute_type, decode, encode
from ..codecs.format import PLAIN, Format
from ..codecs.place import walk_rows
from ..lang import INTERPRETED, jit, tl
from ..multi_tensor import (
    address,
    apply_rule,
    block_size,
    last_chunk,
    update_constants,
    whole_chunk,
)
from ..telemetry import begin_sums, sums_at

_INTERPRETED = INTERPRETED if tl is None else tl.constexpr(INTERPRETED)


@jit
def _add_samples(
    total, squares, samples, first, numel, offsets, mask, COUNT: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Add the chunks of some consecutive samples, and their squares."""
    # From a scalar: of pointers that a loop carries, the alignment is forgotten.
    sample = samples + tl.cast(first, tl.int64) * numel
    for _ in tl.static_range(COUNT):
        x = decode(sample + offsets, mask, COMPUTE)
        total += x
        squares += x * x
        sample += numel
    return total, squares


@jit
def _sum_samples(
    column, width, counts, numel, offsets, mask,
    FIRST: tl.constexpr, PARTS: tl.constexpr, DTYPES: tl.constexpr, COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum a chunk of all samples, and its squares."""
    total = tl.zeros((BLOCK,), COMPUTE)
    squares = tl.zeros((BLOCK,), COMPUTE)
    if ALIGNED:
        # From sample to sample, too: the host has looked. A hint on a loaded number gets lost on
        # its way through the compiler, a product does not.
        numel = numel // 16 * 16
    for part in tl.static_range(PARTS):
        samples = address(column, width, FIRST + part, DTYPES, ALIGNED)
        count = tl.load(counts + part)
        # Four at a time, for as many accesses on the way, and the rest one by one.
        whole = count // 4 * 4
        if _INTERPRETED:
            # The interpreter of Triton 3.6 fails on range() with a run-time bound.
            done = 0
            while done < whole:
                total, squares = _add_samples(
                    total, squares, samples, done, numel, offsets, mask, 4, COMPUTE
                )
                done += 4
            while done < count:
                total, squares = _add_samples(
                    total, squares, samples, done, numel, offsets, mask, 1, COMPUTE
                )
                done += 1
        else:
            for done in range(0, whole, 4):
                total, squares = _add_samples(
                    total, squares, samples, done, numel, offsets, mask, 4, COMPUTE
                )
            for done in range(whole, count):
                total, squares = _add_samples(
                    total, squares, samples, done, numel, offsets, mask, 1, COMPUTE
                )
    return total, squares


@jit(do_not_specialize=["width"])
def reduce_samples(
    table,  # int64 [4 + PARTS, width]: numel, unused, sum, squares, parts
    width,  # int32: columns of the table
    chunk_tensor,  # int32 [programs]: column of the tensor
    chunk_index,  # int32 [programs]: which chunk of that tensor
    counts,  # int32 [PARTS]: samples in each part
    DTYPES: tl.constexpr,  # element types of sum, squares and parts
    PARTS: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Reduce samples to their sum and the sum of their squares."""
    program = tl.program_id(0)
    column = table + tl.load(chunk_tensor + program)
    numel = tl.load(column)
    start = tl.load(chunk_index + program).to(tl.int64) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    if start + BLOCK <= numel:
        _reduce_chunk(
            column, width, counts, numel, offsets, None, PARTS, DTYPES, COMPUTE, ALIGNED, BLOCK
        )
    else:
        _reduce_chunk(
            column, width, counts, numel, offsets, offsets < numel,
            PARTS, DTYPES, COMPUTE, ALIGNED, BLOCK,
        )  # fmt: skip


@jit
def _reduce_chunk(
    column, width, counts, numel, offsets, mask,
    PARTS: tl.constexpr, DTYPES: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    total, squares = _sum_samples(
        column, width, counts, numel, offsets, mask, 2, PARTS, DTYPES, COMPUTE, ALIGNED, BLOCK
    )
    encode(address(column, width, 0, DTYPES, ALIGNED) + offsets, total, mask)
    encode(address(column, width, 1, DTYPES, ALIGNED) + offsets, squares, mask)


@jit(do_not_specialize=["width"])
def update_from_samples(
    table,  # int64: the table of ``update_tensors``, with PARTS inputs
    width,  # int32: columns of the table
    chunk_tensor,  # int32 [programs]: column of the tensor
    chunk_index,  # int32 [programs]: which chunk of that tensor
    coefficients,  # float64 [rows, STRIDE]
    control,  # float64 [3]: as of ``update_tensors``
    counts,  # int32 [PARTS]: samples in each part
    RULE: tl.constexpr,  # the device function of the rule; its inputs are sum and sum of squares
    OPTIONS: tl.constexpr,
    DTYPES: tl.constexpr,  # element types of parameter, parts and what else is kept
    DEGREES: tl.constexpr,  # (1, 2)
    N_COEFFICIENTS: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,  # whether every sample starts at a multiple of 16 bytes
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,  # as of ``update_tensors``, as what follows
    PARAMETER: tl.constexpr,
    STATES: tl.constexpr,
    ROWS: tl.constexpr,
    DRAWS: tl.constexpr,
    AVERAGE: tl.constexpr,
    ROWWISE: tl.constexpr,
    PIECES: tl.constexpr,
    MEASURED: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Reduce samples and update every chunk in place, in one pass over memory."""
    program = tl.program_id(0)
    tensor = tl.load(chunk_tensor + program)
    chunk = tl.load(chunk_index + program).to(tl.int64)
    # As of ``update_tensors``.
    if (tl.load(control + 1) == 0) & (tensor >= 0) & (chunk >= 0):
        column = table + tensor
        numel = tl.load(column)
        row = coefficients + tl.load(column + width) * STRIDE
        scale = tl.load(control).to(COMPUTE)
        sums = None
        if MEASURED:
            sums = sums_at(column, width, chunk, control, MEASURED, COMPUTE)
        scalars = ()
        for i in tl.static_range(N_COEFFICIENTS):
            scalars = scalars + (tl.load(row + i).to(COMPUTE),)
        step = None
        if DRAWS:
            step = tl.load(row + (STRIDE - 1)).to(tl.int64)
        start = chunk * BLOCK
        offsets = start + tl.arange(0, BLOCK)
        # Samples are reduced before a chunk is placed, which would keep its numbers over the loop.
        if ROWWISE:
            place = walk_rows(column, width, numel, chunk, 2 + len(DTYPES), BLOCK)
            reduced = _reduced(
                column, width, counts, numel, place[0], place[1], scale,
                DTYPES, COMPUTE, ALIGNED, BLOCK, PARTS,
            )  # fmt: skip
            apply_rule(
                column, width, None, place, step, reduced[:2], reduced[2], sums, scalars,
                RULE, OPTIONS, DTYPES, PARTS, COMPUTE, ALIGNED, PARAMETER, STATES, ROWS, DRAWS,
                AVERAGE,
            )  # fmt: skip
        elif start + BLOCK <= numel:
            reduced = _reduced(
                column, width, counts, numel, offsets, None, scale,
                DTYPES, COMPUTE, ALIGNED, BLOCK, PARTS,
            )  # fmt: skip
            whole = whole_chunk(column, width, offsets, chunk, DTYPES, DRAWS)
            apply_rule(
                column, width, None, whole, step, reduced[:2], reduced[2], sums, scalars,
                RULE, OPTIONS, DTYPES, PARTS, COMPUTE, ALIGNED, PARAMETER, STATES, ROWS, DRAWS,
                AVERAGE,
            )  # fmt: skip
        elif PIECES:
            if MEASURED:
                begin_sums(sums)
            piece = chunk * (BLOCK // 256)
            while piece * 256 < numel:
                elements = piece * 256 + tl.arange(0, 256)
                reduced = _reduced(
                    column, width, counts, numel, elements, elements < numel, scale,
                    DTYPES, COMPUTE, ALIGNED, 256, PARTS,
                )  # fmt: skip
                last = last_chunk(column, width, numel, elements, piece, DTYPES, DRAWS)
                apply_rule(
                    column, width, None, last, step, reduced[:2], reduced[2], sums, scalars,
                    RULE, OPTIONS, DTYPES, PARTS, COMPUTE, ALIGNED, PARAMETER, STATES, ROWS, DRAWS,
                    AVERAGE, True,
                )  # fmt: skip
                piece += 1
        else:
            reduced = _reduced(
                column, width, counts, numel, offsets, offsets < numel, scale,
                DTYPES, COMPUTE, ALIGNED, BLOCK, PARTS,
            )  # fmt: skip
            last = last_chunk(column, width, numel, offsets, chunk, DTYPES, DRAWS)
            apply_rule(
                column, width, None, last, step, reduced[:2], reduced[2], sums, scalars,
                RULE, OPTIONS, DTYPES, PARTS, COMPUTE, ALIGNED, PARAMETER, STATES, ROWS, DRAWS,
                AVERAGE,
            )  # fmt: skip


@jit
def _reduced(
    column, width, counts, numel, offsets, mask, scale,
    DTYPES: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Return a chunk's sum and sum of squares over the samples, as a rule takes them.

    And the sum as it is, for telemetry.
    """
    total, squares = _sum_samples(
        column, width, counts, numel, offsets, mask, 1, PARTS, DTYPES, COMPUTE, ALIGNED, BLOCK
    )
    return total * scale, squares * scale * scale, total


# Below the kernels, whose lines are a part of their keys in Triton's cache.


def reduce_samples_constants(types: tuple, aligned: bool) -> dict[str, object]:
    """State what ``reduce_samples`` is compiled for: whoever launches or compiles it asks here.

    Args:
        types: Triton's types of sum, squares and parts.
        aligned: whether every sample starts at a multiple of 16 bytes.
    """
    return {
        "DTYPES": types,
        "PARTS": len(types) - 2,
        "COMPUTE": compute_type(types),
        "ALIGNED": aligned,
        "BLOCK": block_size(aligned),
    }


def update_from_samples_constants(
    rule,
    options: tuple[bool, ...],
    types: tuple,
    parts: int,
    aligned: bool,
    block: int,
    format: Format = PLAIN,
    rowwise: bool = False,
    stride: int | None = None,
    measured: bool = False,
) -> dict[str, object]:
    """Do the same for ``update_from_samples``; as ``multi_tensor.update_constants``, with parts."""
    common = update_constants(
        rule, options, types, aligned, block, format, rowwise, stride, parts, measured=measured
    )
    del common["EARLY"]  # never: they would be kept over the loop
    return {**common, "PARTS": parts}
