"""Biases and gains of normalisations in Triton: one read of the errors, see ``reference``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.launch import launch
from ...kernels.per_sample import vectors
from .samples import Samples

Pair = tuple[Tensor | None, Tensor]

# Programs that keep a large GPU's memory busy, a few on each multiprocessor. A constant, so that
# results do not depend on the device.
PROGRAMS = 1024
# A program reads this many tiles at least, so that what it leaves is small beside it.
MIN_TILES = 2


def vector(
    e: Tensor, samples: Samples, dtype: torch.dtype | None, squares: Tensor | None = None
) -> Pair:
    """Reduce a bias; see ``reference.vector``."""
    _, _, gradient, result = _reduce(e, None, None, None, samples, dtype, (None, squares), True)
    assert result is not None
    return gradient, result


def affine(
    e: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    samples: Samples,
    dtype: torch.dtype | None,
    squares: Tensor | None = None,
) -> Pair:
    """Reduce the gain of a normalisation; see ``reference.affine``."""
    gradient, result, _, _ = _reduce(e, x, mean, rstd, samples, dtype, (squares, None), False)
    assert result is not None
    return gradient, result


def affine_and_bias(
    e: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    samples: Samples,
    dtype: torch.dtype | None,
    squares_gain: Tensor | None = None,
    squares_bias: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor]:
    """Reduce gain and bias of a normalisation, reading ``e`` once; see ``reference``."""
    gain, gain_squares, bias, bias_squares = _reduce(
        e, x, mean, rstd, samples, dtype, (squares_gain, squares_bias), True
    )
    assert gain_squares is not None and bias_squares is not None
    return gain, gain_squares, bias, bias_squares


@dataclass(frozen=True)
class Plan:
    """How the work is divided.

    Attributes:
        block: columns of a tile.
        rows: positions of a tile.
        lanes: samples of a tile.
        chunks: programs that share a sample; with more than 1, a program has one sample.
        samples_per_program: otherwise.
        parts: programs for each block of columns.
    """

    block: int
    rows: int
    lanes: int
    chunks: int
    samples_per_program: int
    parts: int


def plan(count: int, length: int, width: int, rows_contiguous: bool) -> Plan:
    """Divide ``count`` samples of ``length`` positions (on average) and ``width`` columns."""
    block = vectors.STRIDED_BLOCK if rows_contiguous else vectors.BLOCK
    block = min(block, max(16, _power_of_two(width)))
    tile_rows = vectors.TILE // block
    # Short samples share a tile, so that it is full all the same.
    rows = min(tile_rows, _power_of_two(length))
    lanes = tile_rows // rows
    wanted = min(
        _ceil(PROGRAMS, _ceil(width, block)),
        _ceil(count * length, MIN_TILES * tile_rows),
        vectors.FINISH_ROWS,
    )
    if count < wanted and length > rows:
        chunks = min(_ceil(wanted, count), _ceil(length, rows))
        return Plan(block, rows, lanes, chunks, 1, count * chunks)
    per_program = max(lanes, count // wanted // lanes * lanes)
    return Plan(block, rows, lanes, 1, per_program, _ceil(count, per_program))


def _reduce(
    e: Tensor,
    x: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    samples: Samples,
    dtype: torch.dtype | None,
    squares: tuple[Tensor | None, Tensor | None],
    bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return gradient and squares of the gain, then of the bias; None where not wanted."""
    _check(e, x, mean, rstd, samples)
    width, device = e.shape[-1], e.device
    wanted = (x is not None, bias)
    if e.numel() == 0:
        return _nothing(e, dtype, squares, wanted)
    length = -(-e.shape[0] // samples.count) if samples.offsets is not None else e.shape[1]
    rows_contiguous = e.stride(-2) == 1 and e.stride(-1) != 1
    p = plan(samples.count, length, width, rows_contiguous)
    chunked = p.chunks > 1
    one_step = samples.offsets is None and length <= p.rows
    entries = sum(wanted) * (1 if chunked else 2)
    partials = torch.empty(p.parts, entries, width, dtype=torch.float32, device=device)
    mean, rstd = _alike(mean, rstd)
    launch(
        vectors.partial_sums, p.parts * _ceil(width, p.block), vectors.THREADS, device,
        e, *_strides(e, 3), x, *_strides(x, 3), mean, rstd, *_strides(rstd, 2),
        samples.offsets, partials, width,
        samples.count, length if samples.offsets is None else 0, p.chunks, p.samples_per_program,
        BIAS=bias, ONE_STEP=one_step, CHUNKED=chunked, SAMPLES=p.lanes, ROWS=p.rows, BLOCK=p.block,
    )  # fmt: skip
    gradients = [_new(e, dtype) if w and dtype is not None else None for w in wanted]
    # The kernel writes contiguous squares in place; others are added to afterwards.
    in_place = [s is not None and s.is_contiguous() for s in squares]
    results = [
        (s if direct else _new(e, torch.float32)) if w else None
        for w, s, direct in zip(wanted, squares, in_place, strict=True)
    ]
    launch(
        vectors.finish, _ceil(width, vectors.FINISH_BLOCK), vectors.FINISH_THREADS, device,
        partials, gradients[0], results[0], gradients[1], results[1],
        width, samples.count if chunked else p.parts, p.chunks,
        **vectors.finish_constants(in_place[0], in_place[1], chunked, _power_of_two(p.chunks)),
    )  # fmt: skip
    for i, (s, result) in enumerate(zip(squares, results, strict=True)):
        if s is not None and result is not None and s is not result:
            results[i] = s.add_(result)
    return gradients[0], results[0], gradients[1], results[1]


def _check(
    e: Tensor, x: Tensor | None, mean: Tensor | None, rstd: Tensor | None, samples: Samples
) -> None:
    dimensions = 3 if samples.offsets is None else 2
    if e.dim() != dimensions:
        raise ValueError(f"errors must have {dimensions} dimensions, got {tuple(e.shape)}")
    if samples.offsets is None and e.shape[0] != samples.count:
        raise ValueError(f"errors of {e.shape[0]} samples, expected {samples.count}")
    if x is not None and x.shape != e.shape:
        raise ValueError(f"input {tuple(x.shape)} and errors {tuple(e.shape)} differ in shape")
    for name, tensor in (("mean", mean), ("rstd", rstd)):
        if tensor is not None and tensor.shape != e.shape[:-1]:
            raise ValueError(f"{name} must be {tuple(e.shape[:-1])}, got {tuple(tensor.shape)}")


def _alike(mean: Tensor | None, rstd: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """In float32 with the same strides, which they mostly have already."""
    mean = None if mean is None else mean.to(torch.float32)
    rstd = None if rstd is None else rstd.to(torch.float32)
    if mean is not None and rstd is not None and mean.stride() != rstd.stride():
        return mean.contiguous(), rstd.contiguous()
    return mean, rstd


def _nothing(
    e: Tensor,
    dtype: torch.dtype | None,
    squares: tuple[Tensor | None, Tensor | None],
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """What no rows at all give."""
    results: list[Tensor | None] = []
    for w, s in zip(wanted, squares, strict=True):
        results.append(_new(e, dtype).zero_() if w and dtype is not None else None)
        results.append((_new(e, torch.float32).zero_() if s is None else s) if w else None)
    return results[0], results[1], results[2], results[3]


def _new(e: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(e.shape[-1], dtype=dtype, device=e.device)


def _strides(tensor: Tensor | None, n: int) -> tuple[int, ...]:
    """Strides of a dense tensor; one that is segmented has 0 for the samples."""
    strides = tensor.stride() if tensor is not None else ()
    return (*[0] * (n - len(strides)), *strides)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(n: int) -> int:
    """The smallest that is not less than n."""
    return 1 << (n - 1).bit_length()
