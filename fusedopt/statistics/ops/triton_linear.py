"""The weight of a linear layer, in Triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels.lang import INTERPRETED
from ...kernels.launch import launch
from ...kernels.per_sample.linear import linear_samples
from ...kernels.per_sample.rows import linear_rows
from ...kernels.per_sample.shapes import (
    Shares,
    Tile,
    rows_tile,
    samples_tile,
    share_tiles,
    shared_by,
    takes_descriptors,
)
from ...memory.layout import has_wide_rows
from .samples import Samples
from .tiles import (
    Kernel,
    capability,
    common_type,
    near,
    precision,
    processors,
    programs_of,
    reduce_tiles,
)


def linear(
    a: Tensor,
    e: Tensor,
    samples: Samples,
    dtype: torch.dtype | None,
    squares: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Reduce the weight of a linear layer.

    Args:
        a: input, ``[batch, length, inputs]`` or ``[tokens, inputs]``, any strides.
        e: gradient of the output, ``[batch, length, outputs]`` or ``[tokens, outputs]``.
        samples: which rows belong to which sample.
        dtype: type of the gradient, or None to leave it out.
        squares: accumulated into, ``[outputs, inputs]``; or None.

    Returns:
        Gradient and squares, ``[outputs, inputs]``, as ``reference.linear`` states them.
    """
    return linear_in_tiles(a, e, samples, dtype, squares)


def linear_in_tiles(
    a: Tensor,
    e: Tensor,
    samples: Samples,
    dtype: torch.dtype | None,
    squares: Tensor | None = None,
    tile: Tile | None = None,
    forced: tuple[int, bool] | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Do what ``linear`` does, with a tile and shares that are chosen where None.

    ``forced`` is for how many processors the weight is shared out, and whether samples may be cut.
    """
    _check(a, e, samples, squares)
    a, e = (near(x) for x in common_type(a, e))
    outputs, inputs = e.shape[-1], a.shape[-1]
    products = precision(e.device)
    wide = has_wide_rows(a) and has_wide_rows(e)
    of_rows = samples.offsets is None and e.shape[1] == 1
    if tile is None:
        choice = capability(e.device), e.dtype.itemsize, products, outputs, inputs, wide
        if of_rows:
            tile = rows_tile(*choice)
        else:
            length, segmented = _length(e, samples), samples.offsets is not None
            tile = samples_tile(*choice, length=length, segmented=segmented)
    tiles = tile.count(outputs, inputs)
    if of_rows:
        shares = _share(tiles, -(-samples.count // tile.rows), 1, e, dtype, forced)
        run = _of_rows(a, e, tile, shares, products)
    elif samples.offsets is None:
        steps = -(-e.shape[1] // tile.rows)
        shares = _share(tiles, samples.count, steps, e, dtype, forced)
        run = _of_samples(a, e, samples, tile, shares, products, wide)
    else:
        shares = _share_segments(tiles, e, samples, tile, forced)
        run = _of_samples(a, e, samples, tile, shares, products, wide)
    shape = (outputs, inputs)
    return reduce_tiles(run, shape, shape, tile, shares, e.device, dtype, squares)


def _length(e: Tensor, samples: Samples) -> int:
    """Rows of a sample; of segments, whose lengths the host does not know, in the mean."""
    if samples.offsets is None:
        return e.shape[1]
    return -(-e.shape[0] // max(samples.count, 1))


def _share(
    tiles: int,
    samples: int,
    steps: int,
    e: Tensor,
    dtype: torch.dtype | None,
    forced: tuple[int, bool] | None,
) -> Shares:
    if forced is not None:
        return shared_by(tiles, samples, steps, *forced)
    # A cut sample's product is put together in the place of the gradient.
    return share_tiles(tiles, samples, steps, processors(e.device), may_cut=dtype is not None)


def _share_segments(
    tiles: int, e: Tensor, samples: Samples, tile: Tile, forced: tuple[int, bool] | None
) -> Shares:
    """Share out segments by their rows, which the kernel finds; none is cut."""
    if samples.count == 0:
        return shared_by(tiles, 0, 0, 1)
    # As linear._first_segment counts.
    positions = -(-e.shape[0] // tile.rows) + samples.count
    if forced is not None:
        return shared_by(tiles, positions, 1, forced[0])
    # Worth it where segments of one length would be.
    steps = -(-positions // samples.count)
    count = processors(e.device)
    if share_tiles(tiles, samples.count, steps, count, may_cut=False).shares:
        return shared_by(tiles, positions, 1, count)
    return Shares(tiles, tiles, 0, positions)


def _of_rows(a: Tensor, e: Tensor, tile: Tile, shares: Shares, products: str) -> Kernel:
    def run(
        gradient: Tensor | None, squares: Tensor, partials: Tensor | None, accumulate: bool
    ) -> None:
        programs, registers = programs_of(shares, partials)
        launch(
            linear_rows, programs, tile.threads, e.device,
            a, e, gradient, squares, partials, e.shape[0], shares.whole, shares.shares,
            shares.positions, e.shape[-1], a.shape[-1],
            a.stride(0), a.stride(2), e.stride(0), e.stride(2),
            **tile.constants(products, accumulate), num_stages=tile.stages, registers=registers,
        )  # fmt: skip

    return run


def _of_samples(
    a: Tensor,
    e: Tensor,
    samples: Samples,
    tile: Tile,
    shares: Shares,
    products: str,
    wide: bool,
) -> Kernel:
    length = 0 if samples.offsets is not None else e.shape[1]
    fit = wide and all(map(_has_dimensions, (a, e))) and samples.offsets is None
    able = INTERPRETED or takes_descriptors(capability(e.device), e.dtype.itemsize, products)
    described = fit and able

    def run(
        gradient: Tensor | None, squares: Tensor, partials: Tensor | None, accumulate: bool
    ) -> None:
        programs, registers = programs_of(shares, partials)
        operands = (a, e)
        if described:
            operands = (_describe(a, tile.rows, tile.inputs), _describe(e, tile.rows, tile.outputs))
        launch(
            linear_samples, programs, tile.threads, e.device,
            *operands, samples.offsets, gradient, squares, partials, samples.count, length,
            shares.whole, shares.shares, shares.positions, shares.unit, shares.steps,
            e.shape[-1], a.shape[-1], *_strides(a), *_strides(e),
            DESCRIBED=described, **tile.constants_of_samples(products, accumulate),
            num_stages=tile.stages, registers=registers,
        )  # fmt: skip

    return run


def _has_dimensions(x: Tensor) -> bool:
    """Whether a descriptor can have a tensor's dimensions: none that repeats or runs backwards."""
    far = 2**40 // x.element_size()
    return x.numel() > 0 and all(
        size == 1 or 0 < stride < far
        for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)
    )


def _describe(x: Tensor, rows: int, columns: int) -> Any:
    """Describe dense samples: a block of a sample's rows, beyond whose end there are zeros."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    # The stride of a dimension of size 1 says nothing.
    row = x.stride(1) if x.shape[1] > 1 else -(-x.shape[2] // 8) * 8
    sample = x.stride(0) if x.shape[0] > 1 else row * x.shape[1]
    return TensorDescriptor(x, list(x.shape), [sample, row, 1], [1, rows, columns])


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Strides from sample to sample, row to row, column to column."""
    if x.dim() == 3:
        return x.stride(0), x.stride(1), x.stride(2)
    # Rows of segments are counted from the first token.
    return 0, x.stride(0), x.stride(1)


def _check(a: Tensor, e: Tensor, samples: Samples, squares: Tensor | None) -> None:
    wanted = 3 if samples.offsets is None else 2
    if a.dim() != wanted or a.shape[:-1] != e.shape[:-1]:
        raise ValueError(
            f"input {tuple(a.shape)} and gradient {tuple(e.shape)} must have {wanted} dimensions,"
            " of which all but the last agree"
        )
    if samples.offsets is None and e.shape[0] != samples.count:
        raise ValueError(f"{e.shape[0]} samples in a tensor, not {samples.count}")
    shape = (e.shape[-1], a.shape[-1])
    if squares is not None and tuple(squares.shape) != shape:
        raise ValueError(f"squares are {tuple(squares.shape)}, not {shape}")
