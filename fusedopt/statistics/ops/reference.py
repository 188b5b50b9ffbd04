"""The operations in PyTorch, for any device and type: what the kernels are compared with.

Samples are walked one by one, or a few at a time where their contributions are small, so that no
tensor of batch x parameter elements is formed. ``dtype=None`` leaves the gradient out: on this path
autograd's own is used, and is the same to the bit with and without statistics.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ...memory.dtypes import compute_dtype
from .samples import Samples

Pair = tuple[Tensor | None, Tensor]

# Contributions formed at once: as many as stay in a second-level cache.
CHUNK_ELEMENTS = 1 << 16


def _compute(*tensors: Tensor) -> torch.dtype:
    return compute_dtype([t.dtype for t in tensors])


def _new(
    squares: Tensor | None, shape: tuple[int, ...], like: Tensor, compute: torch.dtype
) -> Tensor:
    if squares is not None:
        return squares
    return torch.zeros(shape, dtype=compute, device=like.device)


def _chunks(samples: Samples, numel: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield pieces ``[some samples, rows, width]`` of canonical tensors."""
    if samples.offsets is not None:
        # Ragged: one by one. On a GPU this waits for the offsets.
        bounds = samples.offsets.tolist()
        for start, stop in zip(bounds, bounds[1:], strict=False):
            yield tuple(t[start:stop].unsqueeze(0) for t in tensors)
        return
    # Never the whole batch at once, except where it is one sample.
    size = max(1, min(samples.count // 2, CHUNK_ELEMENTS // max(numel, 1)))
    for start in range(0, samples.count, size):
        yield tuple(t[start : start + size] for t in tensors)


def _add_squares(squares: Tensor, rows: Tensor) -> None:
    """Add the sum over the first dimension of ``rows ** 2``."""
    if len(rows) == 1:
        squares.addcmul_(rows[0], rows[0])
    else:
        squares.add_(rows.square_().sum(0))


def linear(
    a: Tensor,
    e: Tensor,
    samples: Samples,
    dtype: torch.dtype | None,
    squares: Tensor | None = None,
) -> Pair:
    """Reduce the weight of a linear layer.

    Args:
        a: input, ``[batch, length, inputs]`` or ``[tokens, inputs]``.
        e: gradient of the output, ``[batch, length, outputs]`` or ``[tokens, outputs]``.
        samples: which rows belong to which sample.
        dtype: type of the gradient, or None to leave it out.
        squares: accumulated into, ``[outputs, inputs]``; or None.

    Returns:
        Gradient ``sum_b E_b^T A_b`` and squares ``sum_b (E_b^T A_b)^2``. With one row a sample
        the latter is ``(E^2)^T (A^2)`` (Goodfellow, arXiv 1510.01799).
    """
    compute = _compute(a, e)
    width, inputs = e.shape[-1], a.shape[-1]
    squares = _new(squares, (width, inputs), e, compute)
    gradient = None
    if dtype is not None:
        flat = e.reshape(-1, width).to(compute), a.reshape(-1, inputs).to(compute)
        gradient = (flat[0].t() @ flat[1]).to(dtype)
    if samples.offsets is None and a.shape[1] == 1:
        squares.addmm_(e[:, 0].to(compute).square().t(), a[:, 0].to(compute).square())
        return gradient, squares
    for a_b, e_b in _chunks(samples, width * inputs, a, e):
        _add_squares(squares, e_b.to(compute).transpose(1, 2) @ a_b.to(compute))
    return gradient, squares


def vector(
    e: Tensor, samples: Samples, dtype: torch.dtype | None, squares: Tensor | None = None
) -> Pair:
    """Reduce a bias.

    Args:
        e: gradient of the output, ``[batch, length, width]`` or ``[tokens, width]``.
        samples: which rows belong to which sample.
        dtype: type of the gradient, or None to leave it out.
        squares: accumulated into, ``[width]``; or None.

    Returns:
        Gradient ``sum_b s_b`` and squares ``sum_b s_b^2``, with ``s_b = sum_t E_bt``: the sum over
        the sequence comes before the square.
    """
    compute = _compute(e)
    squares = _new(squares, (e.shape[-1],), e, compute)
    sums = _sums(e.to(compute), samples)
    squares.add_(sums.square().sum(0))
    return (None if dtype is None else sums.sum(0).to(dtype)), squares


def _sums(e: Tensor, samples: Samples) -> Tensor:
    """Sum each sample's rows: ``[samples, width]``."""
    if samples.offsets is None:
        return e.sum(1)
    sums = e.new_zeros(samples.count, e.shape[-1])
    return sums.index_add_(0, samples.of_rows(len(e)), e)


def affine(
    e: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    samples: Samples,
    dtype: torch.dtype | None,
    squares: Tensor | None = None,
) -> Pair:
    """Reduce the gain of a normalisation.

    Args:
        e: gradient of the output, ``[batch, length, width]`` or ``[tokens, width]``.
        x: input, of the same shape.
        mean: of each row, ``[batch, length]`` or ``[tokens]``; None for RMSNorm.
        rstd: reciprocal of each row's standard deviation or root mean square.
        samples: which rows belong to which sample.
        dtype: type of the gradient, or None to leave it out.
        squares: accumulated into, ``[width]``; or None.

    Returns:
        Gradient and squares of ``s_b = sum_t E_bt (x_bt - mean_bt) rstd_bt``.
    """
    compute = _compute(e, x)
    normal = x.to(compute)
    if mean is not None:
        normal = normal - mean.to(compute).unsqueeze(-1)
    normal = normal * rstd.to(compute).unsqueeze(-1)
    return vector(normal.mul_(e), samples, dtype, squares)


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
    """Reduce gain and bias of a normalisation: ``affine`` and ``vector`` in one call."""
    gain = affine(e, x, mean, rstd, samples, dtype, squares_gain)
    return (*gain, *vector(e, samples, dtype, squares_bias))


def embedding(
    ids: Tensor,
    e: Tensor,
    samples: Samples,
    vocabulary: int,
    padding_idx: int | None,
    dtype: torch.dtype | None,
    squares: Tensor | None = None,
) -> Pair:
    """Reduce an embedding table.

    Args:
        ids: integers, ``[batch, length]`` or ``[tokens]``.
        e: gradient of the output, ``[batch, length, width]`` or ``[tokens, width]``.
        samples: which rows belong to which sample.
        vocabulary: number of rows of the table.
        padding_idx: an id that contributes nothing, or None.
        dtype: type of the gradient, or None to leave it out.
        squares: accumulated into, ``[vocabulary, width]``; or None.

    Returns:
        Gradient and squares. Tokens that a sample repeats are summed before squaring.
    """
    compute = _compute(e)
    width = e.shape[-1]
    squares = _new(squares, (vocabulary, width), e, compute)
    if samples.offsets is None:
        sample = torch.arange(samples.count, device=ids.device)
        sample = sample.unsqueeze(1).expand(ids.shape).reshape(-1)
    else:
        sample = samples.of_rows(len(ids))
    ids, e = ids.reshape(-1).to(torch.int64), e.reshape(-1, width).to(compute)
    if padding_idx is not None:
        e = torch.where((ids == padding_idx).unsqueeze(1), 0.0, e)
    pairs, which = torch.unique(sample * vocabulary + ids, return_inverse=True)
    rows = e.new_zeros(len(pairs), width).index_add_(0, which, e)
    tokens = pairs % vocabulary
    gradient = None
    if dtype is not None:
        gradient = rows.new_zeros(vocabulary, width).index_add_(0, tokens, rows).to(dtype)
    squares.index_add_(0, tokens, rows.square_())
    return gradient, squares


def convolution(
    x: Tensor,
    e: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    dtype: torch.dtype | None,
    squares: Tensor | None = None,
) -> Pair:
    """Reduce the weight of a convolution.

    Args:
        x: input, ``[batch, channels, height, width]``.
        e: gradient of the output, ``[batch, outputs, out height, out width]``.
        kernel_size: height and width.
        stride: in pixels.
        padding: zeros at each side, in pixels.
        dilation: distance of the kernel's points, in pixels.
        groups: blocks of channels that do not mix.
        dtype: type of the gradient, or None to leave it out.
        squares: accumulated into, ``[outputs, channels / groups, *kernel_size]``; or None.

    Returns:
        Gradient and squares; the sum over positions comes before the square.
    """
    compute = _compute(x, e)
    outputs, channels = e.shape[1], x.shape[1] // groups
    shape = (outputs, channels, *kernel_size)
    squares = _new(squares, shape, e, compute)
    total = squares.new_zeros(shape) if dtype is not None else None
    samples = Samples(len(x))
    # What is formed at once is a contribution, or an unfolded input: whichever is larger.
    positions = e.shape[2] * e.shape[3]
    unfolded = groups * channels * kernel_size[0] * kernel_size[1] * positions
    for x_b, e_b in _chunks(samples, max(squares.numel(), unfolded), x, e):
        patches = F.unfold(x_b.to(compute), kernel_size, dilation, padding, stride)
        patches = patches.unflatten(1, (groups, -1))
        errors = e_b.to(compute).flatten(2).unflatten(1, (groups, -1))
        rows = (errors @ patches.transpose(2, 3)).reshape(len(x_b), *shape)
        if total is not None:
            total.add_(rows.sum(0))
        _add_squares(squares, rows)
    return (None if total is None else total.to(dtype)), squares
