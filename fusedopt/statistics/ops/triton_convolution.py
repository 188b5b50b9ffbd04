"""The weight of a convolution, in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.lang import tl
from ...kernels.launch import launch
from ...kernels.per_sample import convolution as kernels
from ...kernels.per_sample.shapes import Tile, convolution_tile, share_tiles, shared_by
from .tiles import (
    capability,
    common_type,
    convolution_precision,
    processors,
    programs_of,
    reduce_tiles,
)

Pair = tuple[int, int]


def convolution(
    x: Tensor,
    e: Tensor,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    dtype: torch.dtype | None,
    squares: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Reduce the weight of a convolution over two dimensions; one over one comes with height 1.

    Args:
        x: input, ``[batch, channels, height, width]``, any strides.
        e: gradient of the output, ``[batch, outputs, output height, output width]``.
        kernel_size: height and width of the kernel; the other pairs are in the same order.
        stride: pixels from one position to the next.
        padding: zeros on each side.
        dilation: pixels between two elements of the kernel.
        groups: groups of channels that see each other alone.
        dtype: type of the gradient, or None to leave it out.
        squares: accumulated into, ``[outputs, channels / groups, *kernel_size]``; or None.

    Returns:
        Gradient and squares, both like the weight.
    """
    geometry = (*kernel_size, *stride, *padding, *dilation)
    return convolution_in_tiles(x, e, geometry, groups, dtype, squares)


def convolution_in_tiles(
    x: Tensor,
    e: Tensor,
    geometry: tuple[int, ...],
    groups: int,
    dtype: torch.dtype | None,
    squares: Tensor | None = None,
    tile: Tile | None = None,
    forced: tuple[int, bool] | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Do what ``convolution`` does, with a tile and shares that are chosen where None.

    ``geometry`` is kernel size, stride, padding and dilation, each a height and a width;
    ``forced`` as in ``linear_in_tiles``.
    """
    kernel_h, kernel_w = geometry[:2]
    shape = (e.shape[1], x.shape[1] // groups, kernel_h, kernel_w)
    _check(x, e, geometry, groups, squares, shape)
    batch, outputs, columns = x.shape[0], shape[0] // groups, shape[1] * kernel_h * kernel_w
    x, e = common_type(x, e)
    out_width = e.shape[3]
    # One stride for all positions: a view, except where rows of the output lie apart.
    e = e.flatten(2)
    precision = convolution_precision(e.device)
    if tile is None:
        choice = capability(e.device), e.dtype.itemsize, precision
        tile = convolution_tile(*choice, outputs, columns)
    chosen, tiles = tile, groups * tile.count(outputs, columns)
    work = tiles, batch, -(-e.shape[2] // tile.rows)
    if forced is None:
        shares = share_tiles(*work, processors(e.device), may_cut=dtype is not None)
    else:
        shares = shared_by(*work, *forced)
    index = tl.int32 if max(_reach(x), _reach(e)) < 2**31 else tl.int64

    def run(
        gradient: Tensor | None, squares: Tensor, partials: Tensor | None, accumulate: bool
    ) -> None:
        programs, registers = programs_of(shares, partials)
        launch(
            kernels.convolution_samples, programs, chosen.threads, e.device,
            x, e, gradient, squares, partials, shares.whole, shares.shares, shares.positions,
            shares.unit, shares.steps, groups, outputs, shape[1], columns,
            x.shape[2], x.shape[3], e.shape[2], out_width, *geometry, *x.stride(), *e.stride(),
            INDEX=index, **chosen.constants_of_samples(precision, accumulate),
            num_stages=chosen.stages, registers=registers,
        )  # fmt: skip

    weight = (outputs, columns)
    return reduce_tiles(run, shape, weight, tile, shares, e.device, dtype, squares)


def _reach(x: Tensor) -> int:
    """How far apart the first and the last element of a sample lie, padding included."""
    return sum(size * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))


def _check(
    x: Tensor,
    e: Tensor,
    geometry: tuple[int, ...],
    groups: int,
    squares: Tensor | None,
    shape: tuple[int, ...],
) -> None:
    if x.dim() != 4 or e.dim() != 4 or x.shape[0] != e.shape[0]:
        raise ValueError(f"input {tuple(x.shape)} and gradient {tuple(e.shape)} do not fit")
    if x.shape[1] % groups or e.shape[1] % groups:
        raise ValueError(f"{x.shape[1]} and {e.shape[1]} channels are not {groups} groups")
    kernel, stride, padding, dilation = (geometry[i : i + 2] for i in (0, 2, 4, 6))
    for i in range(2):
        free = x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1
        if free // stride[i] + 1 != e.shape[2 + i]:
            raise ValueError(
                f"a gradient of {tuple(e.shape)} does not belong to an input of {tuple(x.shape)}"
            )
    if squares is not None and tuple(squares.shape) != shape:
        raise ValueError(f"squares are {tuple(squares.shape)}, not {shape}")
