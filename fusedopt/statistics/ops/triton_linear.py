"""The weight of a linear layer, in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.launch import launch
from ...kernels.per_sample import linear as kernels
from ...kernels.per_sample.shapes import Tile, choose_splits, rows_tile, samples_tile
from ...memory.layout import has_wide_rows
from .samples import Samples
from .tiles import (
    capability,
    common_type,
    fastest_precision,
    near,
    precision,
    processors,
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
    splits: int | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Do what ``linear`` does, with a tile and a number of splits that are chosen where None."""
    _check(a, e, samples, squares)
    a, e = (near(x) for x in common_type(a, e))
    outputs, inputs = e.shape[-1], a.shape[-1]
    dense = samples.offsets is None
    length = e.shape[1] if dense else -(-e.shape[0] // max(samples.count, 1))
    of_rows = dense and length == 1
    products = precision(e.device)
    # Squares of 16-bit operands need the range of float32, and no more bits than tf32 keeps.
    square_products = fastest_precision(e.device) if e.dtype.itemsize == 2 else products
    if tile is None:
        choose = rows_tile if of_rows else samples_tile
        wide = has_wide_rows(a) and has_wide_rows(e)
        tile = choose(capability(e.device), e.dtype.itemsize, products, outputs, inputs, wide)
    # A row block is the smallest share of rows; a sample that of whole samples.
    shares = -(-samples.count // tile.rows) if of_rows else samples.count
    if splits is None:
        steps = 1 if of_rows else max(1, -(-length // tile.rows))
        tiles = max(1, tile.count(outputs, inputs))
        splits = choose_splits(tiles, shares, steps, processors(e.device)) if shares else 1
    share = max(1, -(-shares // splits)) * (tile.rows if of_rows else 1)
    chosen, programs = tile, tile.count(outputs, inputs) * splits

    def run(gradient: Tensor | None, squares: Tensor, accumulate: bool) -> None:
        meta = {**chosen.constants(products, accumulate), "num_stages": chosen.stages}
        if of_rows:
            launch(
                kernels.linear_rows, programs, chosen.threads, e.device,
                a, e, gradient, squares, samples.count, share, outputs, inputs,
                a.stride(0), a.stride(2), e.stride(0), e.stride(2),
                SQUARE_PRECISION=square_products, **meta,
            )  # fmt: skip
        else:
            launch(
                kernels.linear_samples, programs, chosen.threads, e.device,
                a, e, samples.offsets, gradient, squares,
                samples.count, length, share, outputs, inputs,
                *_strides(a), *_strides(e), **meta,
            )  # fmt: skip

    return reduce_tiles(run, (outputs, inputs), splits, e.device, dtype, squares)


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
